"""How long a chore's problem stands: as long as passes of the chore raise it; and an outage of the replica is one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from vmsnap.errors import StoreUnreachableError, ToolError, VmsnapError
from vmsnap.model.due import ReplicateEntry
from vmsnap.model.facts import Problem
from vmsnap.monitoring.standing import Standing
from vmsnap.oversight import Hearing
from vmsnap.ports.observer import ChoreDone
from vmsnap.testing.world import FakeClock

AT = datetime(2026, 11, 21, tzinfo=UTC)


class Chore:
    """Says how passes go."""

    def __init__(self) -> None:
        self.standing = Standing()

    def fails(self, guest: str | None, text: str, *, name: str = "prune") -> bool:
        return self._says(guest, name=name, error=ToolError(text))

    def goes_well(self, guest: str) -> bool:
        return self._says(guest, name="prune", error=None)

    def ends(self, *, name: str = "prune", whole: bool = True, error: VmsnapError | None = None) -> bool:
        return self.standing.hear(ChoreDone(name=name, at=AT, error=error, whole=whole))

    def _says(self, guest: str | None, *, name: str, error: VmsnapError | None) -> bool:
        return self.standing.hear(ChoreDone(name=name, at=AT, guest=guest, error=error))

    @property
    def wrong(self) -> list[tuple[str, str]]:
        return [(problem.about, problem.error.brief) for problem in self.standing.problems]


def test_a_problem_is_known_at_once_and_over_with_a_pass_that_does_not_raise_it() -> None:
    chore = Chore()
    assert chore.fails("a", "stuck")
    assert chore.wrong == [("chore: prune a", "stuck")]
    chore.goes_well("b")
    chore.ends()
    assert chore.wrong == [("chore: prune a", "stuck")]
    assert not chore.fails("a", "stuck"), "it is no news"
    chore.ends()
    chore.goes_well("a")
    assert chore.wrong == [("chore: prune a", "stuck")], "the pass goes on and may raise it yet"
    chore.ends()
    assert chore.wrong == []
    assert chore.fails("a", "stuck")


def test_a_pass_that_was_cut_ends_nothing_and_makes_nothing_known() -> None:
    chore = Chore()
    chore.fails("a", "stuck")
    chore.ends(whole=False)
    chore.fails("b", "full")
    chore.ends(whole=False, error=ToolError("the store is gone"))
    assert chore.wrong == [
        ("chore: prune", "the store is gone"),
        ("chore: prune a", "stuck"),
        ("chore: prune b", "full"),
    ]
    assert chore.standing.heard == frozenset()
    chore.ends()
    assert chore.wrong == []
    assert chore.standing.heard == {"prune"}


def test_chores_do_not_end_each_others_problems() -> None:
    chore = Chore()
    chore.fails("a", "stuck")
    chore.ends()
    chore.fails("a", "damaged", name="verify")
    chore.ends(name="verify")
    chore.ends()
    assert chore.wrong == [("chore: verify a", "damaged")]


def test_several_errors_of_a_guest_are_one_problem_and_each_is_news_once() -> None:
    chore = Chore()
    for number in range(3):
        assert [chore.fails("a", "one"), chore.fails("a", "two")] == [number == 0] * 2
        chore.ends()
    assert chore.wrong == [("chore: prune a", "one")]


class Told:
    """In place of a monitor: remembers what stands."""

    problems: tuple[Problem, ...] = ()
    heard: frozenset[str] = frozenset()

    def stands(self, problems: tuple[Problem, ...], *, heard: frozenset[str]) -> None:
        self.problems, self.heard = problems, heard


def test_an_outage_of_the_replica_in_a_timed_round_is_one_problem() -> None:
    told: Any = Told()
    away = StoreUnreachableError("the server did not answer", remedy="look at it")
    entries = [
        *(ReplicateEntry(guest=f"vm{number}", error=away) for number in range(200)),
        ReplicateEntry(guest="x", error=ToolError("its copy is damaged")),
        ReplicateEntry(guest="y"),
    ]
    assert list(Hearing(told).of_copies(entries, clock=FakeClock())) == entries
    assert [(one.guest, one.error.brief, one.error.remedy) for one in told.problems] == [
        ("", "the server did not answer (200 guests: vm0, vm1, vm10 and 197 more)", "look at it"),
        ("x", "its copy is damaged", None),
    ]
    assert told.heard == {"replicate"}
    list(Hearing(told).of_copies([], clock=FakeClock()))
    assert told.problems == ()
