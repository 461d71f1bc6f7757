"""What can differ between two snapshots, and when a hint is of use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vmsnap.model.hints import HINT_BLOCK_BYTES, MOST_HINTED_IN_A_ROW, BlockSet, DiskHint, may_differ, why_full
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import DiskRecord, ReadRecord

BLOCKS = 12
SIZE = BLOCKS * HINT_BLOCK_BYTES - 100
Union = Callable[[BlockSet, BlockSet, BlockSet], BlockSet]


def some(*numbers: int) -> BlockSet:
    return BlockSet.of(((number * HINT_BLOCK_BYTES, 1) for number in numbers), size_bytes=SIZE)


def numbers(blocks: BlockSet) -> set[int]:
    return {number for first, count in blocks.runs() for number in range(first, first + count)}


sets = st.sets(st.integers(0, BLOCKS - 1)).map(lambda chosen: some(*chosen))


@dataclass(frozen=True)
class Generation:
    """What is written before and during a run, by the guest, and by the run's clone; whether a snapshot comes of it."""

    before: frozenset[int]
    during: frozenset[int]
    by_clone: frozenset[int]
    fails: bool


places = st.frozensets(st.integers(0, BLOCKS - 1), max_size=4)
generations = st.lists(st.builds(Generation, places, places, places, st.booleans()), min_size=2, max_size=6)


@dataclass
class Model:
    """A guest's disk, overlays and bitmaps as QEMU has them, and a store that reads only what may differ."""

    union: Union
    disk: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    stored: list[int] = field(default_factory=list)
    bitmaps: dict[int, set[int]] = field(default_factory=dict)
    parent: int = -1
    parents_clone: BlockSet = field(default_factory=some)
    words: int = 0

    def write(self, target: list[int], block: int) -> None:
        self.words += 1
        target[block] = self.words

    def write_disk(self, block: int, word: int) -> None:
        self.disk[block] = word
        for bitmap in self.bitmaps.values():
            bitmap.add(block)

    def run(self, number: int, generation: Generation) -> None:
        """One run. What the guest writes meanwhile is on its overlay, and is merged into its disk afterwards."""
        for block in generation.before:
            self.words += 1
            self.write_disk(block, self.words)
        self.bitmaps[number] = set()
        frozen, overlay = list(self.disk), dict[int, int]()
        clone = list(frozen)
        for block in generation.during:
            self.words += 1
            overlay[block] = self.words
        for block in generation.by_clone:
            self.write(clone, block)
        if not generation.fails:
            self.store(clone, number=number, by_clone=some(*generation.by_clone))
        for block, word in overlay.items():
            self.write_disk(block, word)
        kept = self.parent if generation.fails else number
        self.bitmaps = {key: bitmap for key, bitmap in self.bitmaps.items() if key == kept}

    def store(self, clone: list[int], *, number: int, by_clone: BlockSet) -> None:
        if self.parent not in self.bitmaps:
            self.stored = list(clone)
        else:
            changed = self.union(some(*self.bitmaps[self.parent]), by_clone, self.parents_clone)
            self.stored = [
                new if block in changed else old
                for block, (new, old) in enumerate(zip(clone, self.stored, strict=True))
            ]
        assert self.stored == clone
        self.parent, self.parents_clone = number, by_clone


def of_all_three(by_guest: BlockSet, by_clone: BlockSet, by_previous_clone: BlockSet) -> BlockSet:
    return may_differ(by_guest=by_guest, by_clone=by_clone, by_previous_clone=by_previous_clone)


def live(work: list[Generation], union: Union) -> None:
    model = Model(union)
    for number, generation in enumerate(work):
        model.run(number, generation)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generations)
def test_over_any_generations_what_is_stored_is_the_disk(work: list[Generation]) -> None:
    live(work, of_all_three)


@pytest.mark.parametrize(
    "forgetful",
    [
        lambda by_guest, by_clone, _previous: by_guest | by_clone,
        lambda by_guest, _clone, previous: by_guest | previous,
        lambda _guest, by_clone, previous: by_clone | previous,
    ],
    ids=["the clone before", "this clone", "the guest"],
)
def test_whatever_is_forgotten_is_missed(forgetful: Union) -> None:
    """The test above is able to fail: for each of the three sources there is a story in which leaving it out corrupts."""

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(generations)
    def search(work: list[Generation]) -> None:
        live(work, forgetful)

    with pytest.raises(AssertionError):
        search()


@given(st.lists(st.tuples(st.integers(0, SIZE * 2), st.integers(0, SIZE))))
def test_a_block_belongs_to_a_set_where_any_of_its_bytes_does(stretches: list[tuple[int, int]]) -> None:
    touched = {
        block
        for block in range(BLOCKS)
        if any(
            offset < (block + 1) * HINT_BLOCK_BYTES and offset + length > block * HINT_BLOCK_BYTES and length
            for offset, length in stretches
        )
    }
    assert numbers(BlockSet.of(stretches, size_bytes=SIZE)) == touched


@given(sets, sets)
def test_sets_are_sets(one: BlockSet, other: BlockSet) -> None:
    assert numbers(one | other) == numbers(one) | numbers(other)
    assert numbers(one & other) == numbers(one) & numbers(other)
    assert numbers(~one) == set(range(BLOCKS)) - numbers(one)
    assert (one.count, (~one).count) == (len(numbers(one)), BLOCKS - len(numbers(one)))
    assert {block for block in range(BLOCKS + 3) if block in one} == numbers(one)
    assert (one | other, ~~one) == (other | one, one)
    runs = list(one.runs())
    assert all(first + count < later for (first, count), (later, _) in itertools.pairwise(runs))


def test_sets_of_different_disks_do_not_mix() -> None:
    with pytest.raises(ValueError, match="blocks of disks of"):
        _ = some(1) | BlockSet.of((), size_bytes=SIZE + 1)


BASE = SnapshotId("0123456789")
RECORD = DiskRecord(
    target="vda",
    image="vda.raw",
    digests="vda.digests",
    digests_sha256="0",
    size_bytes=SIZE,
    data_bytes=0,
    new_bytes=0,
    written="vda.written",
    written_sha256="0",
)
HINT = DiskHint(target="vda", since=BASE, written=some(1))


@pytest.mark.parametrize(
    ("hint", "base", "before", "size_bytes", "reason"),
    [
        (HINT, BASE, RECORD, SIZE, None),
        (HINT, None, None, SIZE, "no earlier snapshot"),
        (HINT, BASE, None, SIZE, "no earlier snapshot"),
        (None, BASE, RECORD, SIZE, "nobody gave a hint"),
        (DiskHint(target="vda", since=BASE, reason="started anew"), BASE, RECORD, SIZE, "started anew"),
        (HINT, SnapshotId("9876543210"), RECORD, SIZE, "since 0123456789"),
        (HINT, BASE, RECORD, SIZE + 512, "changed its size"),
        (HINT, BASE, RECORD.model_copy(update={"size_bytes": SIZE + 512}), SIZE, "changed its size"),
        (HINT, BASE, RECORD.model_copy(update={"written": None}), SIZE, "does not say where its clone wrote"),
        (
            HINT,
            BASE,
            RECORD.model_copy(update={"read": ReadRecord(read_bytes=1, hinted_in_a_row=MOST_HINTED_IN_A_ROW)}),
            SIZE,
            "now and then one is read in full",
        ),
    ],
)
def test_a_hint_is_of_use_only_since_the_very_snapshot_and_for_the_same_disk(
    hint: DiskHint | None, base: SnapshotId | None, before: DiskRecord | None, size_bytes: int, reason: str | None
) -> None:
    told = why_full(hint, base=base, before=before, size_bytes=size_bytes)
    assert (told is None) == (reason is None)
    assert reason is None or reason in str(told)
