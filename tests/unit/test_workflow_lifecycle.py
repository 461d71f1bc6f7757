from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import IllegalTransitionError
from vmsnap.model.lifecycle import TRANSITIONS, Event, State, advance, diagram

STATES = st.sampled_from(State)
EVENTS = st.sampled_from(Event)


@given(state=STATES, event=EVENTS)
def test_a_step_is_in_the_table_or_illegal(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=state.value):
            advance(state, event)


def _walk(events: list[Event]) -> list[State]:
    states = [State.PLANNED]
    for event in events:
        try:
            states.append(advance(states[-1], event))
        except IllegalTransitionError:
            continue
    return states


@given(events=st.lists(EVENTS, max_size=60))
def test_no_order_of_events_runs_a_clone_unfenced_or_stores_it_unproven(events: list[Event]) -> None:
    states = _walk(events)
    assert len(set(states)) == len(states)
    if State.RUNNING in states:
        assert states[states.index(State.RUNNING) - 1] is State.FENCED
    if State.STORED in states:
        assert states[states.index(State.STORED) - 1] is State.PROVEN_CLEAN
        assert State.FAILED not in states


@given(events=st.lists(EVENTS, max_size=60))
def test_every_run_can_still_be_discarded(events: list[Event]) -> None:
    state = _walk(events)[-1]
    if state is State.DISCARDED:
        assert not [key for key in TRANSITIONS if key[0] is state]
        return
    if state is not State.STORED and state is not State.FAILED:
        state = advance(state, Event.FAIL)
    assert advance(state, Event.DISCARD) is State.DISCARDED


def test_every_state_and_event_is_used() -> None:
    assert {state for state, _ in TRANSITIONS} | {State.DISCARDED} == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)
    reachable = set(TRANSITIONS.values()) | {State.PLANNED}
    assert reachable == set(State)


def test_what_is_stored_does_not_fail_any_more() -> None:
    with pytest.raises(IllegalTransitionError):
        advance(State.STORED, Event.FAIL)


def test_the_diagram_shows_every_transition_once() -> None:
    lines = diagram().splitlines()
    arrows = [line for line in lines if "-->" in line and "[*]" not in line]
    assert len(arrows) == len(set(arrows)) == len(TRANSITIONS)
    for (before, event), after in TRANSITIONS.items():
        arrow = f"    {before.value.replace(' ', '_')} --> {after.value.replace(' ', '_')}: {event}"
        assert arrow in arrows
