"""The collecting protocol under any interleaving and any death, and the same with one rule left out, which must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.unit.collecting_model import Collector, Place, Remover, Rules, Step, Uploader

SNAPSHOTS = ("s1", "s2")
CONTENTS = ("a", "b")
OLD = "0"


def snapshots(place: Place) -> dict[str, frozenset[str]]:
    """Return the packs that each snapshot needs."""
    return {name: packs for name, packs in place.values("snapshots/").items() if isinstance(packs, frozenset)}


@dataclass
class Running:
    """An actor and how far it is."""

    actor: Uploader | Remover | Collector
    steps: Step
    ended: bool = False
    call: str = ""

    def step(self) -> None:
        """Make the call that is next, and come to the one after it."""
        try:
            self.call = next(self.steps)
        except StopIteration:
            self.ended = True

    def die(self) -> None:
        self.steps.close()
        self.ended = True


class Interleaving(RuleBasedStateMachine):
    """Uploads, removals and collectors, one call at a time, in any order; any of them may die or stand still."""

    protocol = Rules()

    def __init__(self) -> None:
        super().__init__()
        self.place = Place()
        self.running: list[Running] = []
        self.uploads: dict[str, Uploader] = {}
        self.collectors = 0
        for content in CONTENTS:
            self.place.put(f"packs/{content}.{OLD}", content)
        self.place.put("snapshots/s1", frozenset({f"packs/{CONTENTS[0]}.{OLD}"}))

    def _start(self, actor: Uploader | Remover | Collector) -> None:
        running = Running(actor, actor.run())
        running.step()
        self.running.append(running)

    def _is_over(self, upload: str) -> bool:
        return self.uploads[upload.partition(".")[0]].over

    @precondition(lambda self: sum(isinstance(one.actor, Uploader) for one in self.running) < 2)
    @rule(snapshot=st.sampled_from(SNAPSHOTS), wanted=st.sets(st.sampled_from(CONTENTS), min_size=1))
    def upload(self, snapshot: str, wanted: set[str]) -> None:
        name = f"u{len(self.uploads)}"
        self.uploads[name] = Uploader(self.place, self.protocol, name, snapshot, tuple(sorted(wanted)))
        self._start(self.uploads[name])

    @precondition(lambda self: any(one.over for one in self.uploads.values()))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        over = sorted(name for name, one in self.uploads.items() if one.over and not one.published)
        if over:
            name = data.draw(st.sampled_from(over))
            self.uploads[name] = replace(self.uploads[name], over=False)
            self._start(self.uploads[name])

    @rule(snapshot=st.sampled_from(SNAPSHOTS))
    def remove(self, snapshot: str) -> None:
        self._start(Remover(self.place, snapshot))

    @precondition(lambda self: sum(isinstance(one.actor, Collector) for one in self.running) < 2)
    @rule(patient=st.booleans())
    def collect(self, *, patient: bool) -> None:
        self.collectors += 1
        self._start(Collector(self.place, self.protocol, f"c{self.collectors}", self._is_over, patient))

    @precondition(lambda self: self.running)
    @rule(
        turns=st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 100])), min_size=1, max_size=8
        )
    )
    def go_on(self, turns: list[tuple[int, int]]) -> None:
        for which, steps in turns:
            if self.running:
                self._step(self.running[which % len(self.running)], steps)

    def _step(self, one: Running, steps: int) -> None:
        for _ in range(steps):
            if not one.ended:
                one.step()
                self.no_live_block_is_lost()
        self.running = [one for one in self.running if not one.ended]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.running.pop(data.draw(st.integers(0, len(self.running) - 1))).die()

    @invariant()
    def no_live_block_is_lost(self) -> None:
        for name, packs in snapshots(self.place).items():
            lost = {pack for pack in packs if pack not in self.place.objects}
            assert not lost, f"{name} needs {lost}"

    def teardown(self) -> None:
        for one in self.running:
            one.die()
        for number in range(4):
            last = Collector(self.place, self.protocol, f"last{number}", lambda upload: True, patient=True)
            for _ in last.run():
                self.no_live_block_is_lost()
        used: set[str] = set()
        for packs in snapshots(self.place).values():
            used |= packs
        assert set(self.place.objects) == used | set(self.place.names("snapshots/")) | set(
            self.place.names("locks/")
        ), "garbage stays"


@pytest.mark.parametrize(
    "rules",
    [Rules(), Rules(asks_for_lease=False), Rules(names_never_return=False)],
    ids=["as written", "collectors that lost their lease", "names that return"],
)
def test_no_live_block_is_lost_and_all_garbage_goes(rules: Rules) -> None:
    """Either the lease or names that never return would be enough."""
    explore(rules, examples=80)


def explore(rules: Rules, *, examples: int) -> None:
    """Search interleavings for one that loses a block or leaves garbage."""
    machine = type("Machine", (Interleaving,), {"protocol": rules})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))


class Story:
    """One interleaving, told by hand."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.place = Place()
        self.place.put("packs/b.0", "b")
        self._dead: set[str] = set()

    def upload(self, name: str, *, snapshot: str) -> Running:
        return self._begun(Uploader(self.place, self.rules, name, snapshot, ("b",)))

    def remove(self, snapshot: str) -> None:
        self.to_the_end(self._begun(Remover(self.place, snapshot)))

    def collector(self, *, patient: bool = True) -> Running:
        return self._begun(Collector(self.place, self.rules, "c", self._dead.__contains__, patient))

    def collect(self, *, patient: bool = True) -> None:
        self.to_the_end(self.collector(patient=patient))

    def kill(self, one: Running) -> None:
        one.die()
        if isinstance(one.actor, Uploader):
            self._dead.add(one.actor.upload)

    def resume(self, killed: Running) -> Running:
        assert isinstance(killed.actor, Uploader)
        return self._begun(replace(killed.actor, over=False))

    def to_the_end(self, one: Running) -> None:
        while not one.ended:
            one.step()

    def to(self, one: Running, call: str, *, times: int = 1) -> None:
        """Go on until the next call is the one named, for so many times."""
        for _ in range(times):
            one.step()
            while one.call != call:
                assert not one.ended, f"it never comes to {call}"
                one.step()

    @property
    def lost(self) -> set[str]:
        return {pack for packs in snapshots(self.place).values() for pack in packs if pack not in self.place.objects}

    def _begun(self, actor: Uploader | Remover | Collector) -> Running:
        return Running(actor, actor.run())


def uploads_that_are_on_are_waited_for(story: Story) -> None:
    upload = story.upload("u", snapshot="s")
    story.to(upload, "put manifest")
    story.collect()
    story.collect()
    story.to_the_end(upload)


def uploads_are_looked_for_after_the_tombstone(story: Story) -> None:
    collector = story.collector()
    story.to(collector, "put tombstone")
    upload = story.upload("u", snapshot="s")
    story.to(upload, "put manifest")
    story.to_the_end(collector)
    story.collect()
    story.to_the_end(upload)


def tombstones_are_read_before_packs_are_listed(story: Story) -> None:
    story.collect()
    upload = story.upload("u", snapshot="s")
    story.to(upload, "list tombstones")
    story.collect()
    story.to_the_end(upload)


def what_has_a_tombstone_is_not_relied_upon(story: Story) -> None:
    story.collect()
    upload = story.upload("u", snapshot="s")
    story.to(upload, "put manifest") if not story.rules.heeds_tombstones else story.to_the_end(upload)
    story.collect()
    story.to_the_end(upload)


def not_even_where_a_snapshot_needs_it(story: Story) -> None:
    first = story.upload("u1", snapshot="s1")
    story.to(first, "put manifest")
    story.collect()
    story.to_the_end(first)
    second = story.upload("u2", snapshot="s2")
    story.to(second, "put manifest")
    story.remove("s1")
    story.collect()
    story.to_the_end(second)


def what_has_a_tombstone_is_looked_for_again(story: Story) -> None:
    upload = story.upload("u", snapshot="s")
    story.to(upload, "put manifest")
    story.collect()
    story.to_the_end(upload)
    story.collect()


def uploads_are_looked_for_before_manifests(story: Story) -> None:
    upload = story.upload("u", snapshot="s")
    story.to(upload, "put manifest")
    story.collect()
    collector = story.collector()
    story.to(collector, "get tombstone")
    story.to(collector, "list manifests" if story.rules.intents_before_manifests else "list intents")
    story.to_the_end(upload)
    story.to_the_end(collector)


def who_is_called_over_cannot_publish(story: Story) -> None:
    upload = story.upload("u", snapshot="s")
    story.to(upload, "put manifest")
    story.collect(patient=False)
    story.collect(patient=False)
    story.to_the_end(upload)


def a_token_ends_with_what_was_in_the_place(story: Story) -> None:
    killed = story.upload("u1", snapshot="s")
    story.to(killed, "list tombstones")
    story.to_the_end(story.upload("u2", snapshot="s"))
    story.kill(killed)
    slow = story.collector()
    story.to(slow, "delete intent")
    story.remove("s")
    again = story.resume(killed)
    story.to(again, "put manifest")
    story.to_the_end(slow)
    story.collect()
    story.collect()
    story.to_the_end(again)


@pytest.mark.parametrize(
    ("rule", "tell"),
    [
        ("waits_for_uploads", uploads_that_are_on_are_waited_for),
        ("looks_for_uploads_after_tombstones", uploads_are_looked_for_after_the_tombstone),
        ("tombstones_before_packs", tombstones_are_read_before_packs_are_listed),
        ("heeds_tombstones", what_has_a_tombstone_is_not_relied_upon),
        ("heeds_tombstones_of_shared", not_even_where_a_snapshot_needs_it),
        ("looks_again", what_has_a_tombstone_is_looked_for_again),
        ("intents_before_manifests", uploads_are_looked_for_before_manifests),
        ("revokes", who_is_called_over_cannot_publish),
        ("ends_token_with_place", a_token_ends_with_what_was_in_the_place),
    ],
)
def test_each_rule_is_needed(rule: str, tell: Callable[[Story], None]) -> None:
    """The same story with the rule and without it: without it a snapshot loses a block."""
    with_it, without_it = Story(Rules()), Story(replace(Rules(), **{rule: False}))
    tell(with_it)
    assert not with_it.lost
    tell(without_it)
    assert without_it.lost
