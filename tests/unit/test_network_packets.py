"""Filters of packet sockets, run by a small interpreter of classic BPF: who is heard, and who is not."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from vmsnap.network.packets import BpfStep, arp_filter, marked_filter
from vmsnap.network.probes import link_local

MARK = 0x89ABCDEF


def accepts(steps: Sequence[BpfStep], *, frame: bytes = b"", mark: int = 0, link: int = 0) -> bool:
    """Run a filter (linux/filter.h): the few instructions that are used here."""
    position, value = 0, 0
    while True:
        step = steps[position]
        position += 1
        if step.code == 0x20:
            value = {0xFFFFF000 + 20: mark, 0xFFFFF000 + 8: link}[step.operand]
        elif step.code == 0x28:
            value = struct.unpack_from("!H", frame, step.operand)[0]
        elif step.code == 0x15:
            position += step.jump_true if value == step.operand else step.jump_false
        else:
            return step.operand != 0


@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_a_mark_is_heard_everywhere_but_at_the_ends(count: int) -> None:
    ends = tuple(range(10, 10 + count))
    steps = marked_filter(MARK, except_links=ends)
    for link in (1, 9, 10 + count, 4000):
        assert accepts(steps, mark=MARK, link=link)
        assert not accepts(steps, mark=0, link=link)
        assert not accepts(steps, mark=MARK - 1, link=link)
    assert not any(accepts(steps, mark=MARK, link=link) for link in ends)


def test_only_arp_passes_the_filter_for_arp() -> None:
    assert accepts(arp_filter(), frame=bytes(12) + b"\x08\x06")
    assert not accepts(arp_filter(), frame=bytes(12) + b"\x08\x00")
    assert not accepts(arp_filter(), frame=bytes(12) + b"\x81\x00")


def test_the_link_local_address_follows_from_the_mac() -> None:
    assert str(link_local(bytes.fromhex("525400aa0001"))) == "fe80::5054:ff:feaa:1"
