"""The fuzzer's target on its own seeds and on random bytes; the fuzzer itself is not part of the tests."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integration.fuzz import target
from integration.fuzz.target import one_input, seeds


@pytest.mark.parametrize("number", range(len(seeds())))
def test_seeds(number: int) -> None:
    one_input(seeds()[number])


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(range(4)), st.binary(max_size=400))
def test_any_bytes(mode: int, data: bytes) -> None:
    one_input(bytes([mode]) + data)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(seeds()), st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6))
def test_damaged_seeds(seed: bytes, changes: list[tuple[int, int]]) -> None:
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    one_input(bytes(data))


def test_a_failure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: bytes) -> None:
        raise KeyError

    one_input(b"\0data")
    monkeypatch.setattr(target, "decode", broken)
    with pytest.raises(KeyError):
        one_input(b"\0data")
