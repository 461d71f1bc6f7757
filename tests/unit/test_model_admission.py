"""Whether another clone has room on the host."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmsnap.model.admission import HostMemory, Place, refusal
from vmsnap.model.ids import RunId

GIB = 1 << 30
runs = st.integers(0, 9).map(lambda number: RunId(f"00000000{number:02x}"))
places = st.builds(Place, run=runs, guest=st.just("db"), memory_bytes=st.integers(0, 64 * GIB))


def place(number: int, *, gib: int) -> Place:
    return Place(run=RunId(f"00000000{number:02x}"), guest=f"db{number}", memory_bytes=gib * GIB)


def test_two_that_begin_together_do_not_get_the_same_memory() -> None:
    memory = HostMemory(available_bytes=6 * GIB)
    assert refusal(place(1, gib=4), held=(), memory=memory, most=9) is None
    refused = refusal(place(2, gib=4), held=(place(1, gib=4),), memory=memory, most=9)
    assert refused is not None
    assert "4096" in refused
    # The first has taken what it was promised: what is available is really free.
    taken = HostMemory(available_bytes=6 * GIB, taken_bytes={RunId("0000000001"): 4 * GIB})
    assert refusal(place(2, gib=4), held=(place(1, gib=4),), memory=taken, most=9) is None


def test_never_more_clones_than_the_host_allows() -> None:
    memory = HostMemory(available_bytes=100 * GIB)
    assert refusal(place(3, gib=1), held=(place(1, gib=1),), memory=memory, most=2) is None
    refused = refusal(place(3, gib=1), held=(place(1, gib=1), place(2, gib=1)), memory=memory, most=2)
    assert refused is not None
    assert "db1, db2" in refused


@given(
    wanted=places,
    held=st.lists(places, max_size=5),
    available=st.integers(0, 256 * GIB),
    taken=st.dictionaries(runs, st.integers(0, 64 * GIB), max_size=5),
)
def test_promises_are_never_more_than_there_is(
    wanted: Place, held: list[Place], available: int, taken: dict[RunId, int]
) -> None:
    memory = HostMemory(available_bytes=available, taken_bytes=taken)
    if refusal(wanted, held=held, memory=memory, most=6) is None:
        open_promises = sum(max(0, item.memory_bytes - taken.get(item.run, 0)) for item in held)
        assert open_promises + wanted.memory_bytes <= available
