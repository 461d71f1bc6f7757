"""The life cycle of a backup run: one table, from which the README's diagram is drawn."""

from __future__ import annotations

from enum import StrEnum

from vmsnap.errors import IllegalTransitionError


class State(StrEnum):
    """Where a backup run is."""

    PLANNED = "planned"
    CAPTURED = "captured"
    FENCED = "fenced"
    RUNNING = "running"
    LAME_DUCK = "lame duck"
    DRAINED = "drained"
    SHUT_OFF = "shut off"
    PROVEN_CLEAN = "proven clean"
    STORED = "stored"
    FAILED = "failed"
    DISCARDED = "discarded"


class Event(StrEnum):
    """What happened to a run."""

    CAPTURE = "capture"
    FENCE = "prove the fence"
    RESUME = "resume the clone"
    REFUSE_WORK = "refuse new work"
    DRAIN = "drain"
    SHUT_DOWN = "shut down"
    PROVE = "prove clean"
    STORE = "store"
    FAIL = "fail"
    DISCARD = "discard the clone"


_ORDER: tuple[tuple[State, Event, State], ...] = (
    (State.PLANNED, Event.CAPTURE, State.CAPTURED),
    (State.CAPTURED, Event.FENCE, State.FENCED),
    (State.FENCED, Event.RESUME, State.RUNNING),
    (State.RUNNING, Event.REFUSE_WORK, State.LAME_DUCK),
    (State.LAME_DUCK, Event.DRAIN, State.DRAINED),
    (State.DRAINED, Event.SHUT_DOWN, State.SHUT_OFF),
    (State.SHUT_OFF, Event.PROVE, State.PROVEN_CLEAN),
    (State.PROVEN_CLEAN, Event.STORE, State.STORED),
)

TRANSITIONS: dict[tuple[State, Event], State] = {
    **{(before, event): after for before, event, after in _ORDER},
    **{(before, Event.FAIL): State.FAILED for before, _, _ in _ORDER},
    (State.STORED, Event.DISCARD): State.DISCARDED,
    (State.FAILED, Event.DISCARD): State.DISCARDED,
}


def advance(state: State, event: Event) -> State:
    """Return the state after ``event``.

    Raises IllegalTransitionError where the table has no such step; the run's state stays as it was.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransitionError(f"a run that is {state} cannot {event}") from None


def diagram() -> str:
    """Return the life cycle as a Mermaid state diagram, one line a transition, in the table's order."""

    def node(state: State) -> str:
        return state.value.replace(" ", "_")

    lines = ["stateDiagram-v2", f"    [*] --> {node(State.PLANNED)}"]
    lines += [f"    {node(before)} --> {node(after)}: {event}" for (before, event), after in TRANSITIONS.items()]
    lines.append(f"    {node(State.DISCARDED)} --> [*]")
    return "\n".join(lines)
