"""Memory images and swap: who could write them to a disk, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.errors import PreconditionError, ToolError
from vmsnap.hypervisors.libvirt import memory
from vmsnap.hypervisors.libvirt.swap import check_swap, knows_noswap, swap_on_disk
from vmsnap.model.capture import SwapRule
from vmsnap.model.guest import Severity

_HEAD = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@pytest.fixture
def swaps(tmp_path: Path) -> Path:
    path = tmp_path / "swaps"
    path.write_text(
        f"{_HEAD}/dev/zram0 partition 8388604 0 100\n/dev/dm-1 partition 1003516 12 -2\n/swap\\040file file 99 0 -3\n"
    )
    return path


def test_compressed_memory_is_no_disk(swaps: Path, tmp_path: Path) -> None:
    assert swap_on_disk(swaps) == ("/dev/dm-1", "/swap\\040file")
    none = tmp_path / "none"
    none.write_text(_HEAD)
    assert swap_on_disk(none) == ()


@pytest.mark.parametrize(
    ("release", "knows"),
    [
        ("6.1.0-37-amd64", False),
        ("6.3.13", False),
        ("6.4.0", True),
        ("6.18.44", True),
        ("7.0-rc1", True),
        ("odd", False),
    ],
)
def test_noswap_came_with_linux_6_4(release: str, *, knows: bool) -> None:
    assert knows_noswap(release) is knows


@pytest.mark.parametrize(
    ("rule", "noswap", "severity"),
    [
        (SwapRule.REFUSE, True, Severity.OK),
        (SwapRule.REFUSE, False, Severity.REFUSAL),
        (SwapRule.WARN, False, Severity.WARNING),
    ],
)
def test_a_host_that_may_swap_images_is_refused_or_warned_of(
    swaps: Path, rule: SwapRule, severity: Severity, *, noswap: bool
) -> None:
    (finding,) = check_swap(rule, noswap=noswap, swaps=swaps)
    assert finding.severity is severity
    assert severity is Severity.OK or "/dev/dm-1" in finding.message


def test_an_old_kernel_without_swap_is_good_enough(tmp_path: Path) -> None:
    none = tmp_path / "none"
    none.write_text(_HEAD)
    (finding,) = check_swap(SwapRule.REFUSE, noswap=False, swaps=none)
    assert finding.severity is Severity.OK


def test_nothing_is_mounted_that_could_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted: list[str] = []

    def mount(argv: tuple[str, ...]) -> str:
        if "noswap" in argv[4]:
            raise ToolError("mount failed: bad option")
        mounted.append(argv[4])
        return ""

    monkeypatch.setattr(memory, "run_tool", mount)
    monkeypatch.setattr(memory, "swap_on_disk", lambda: ("/dev/dm-1",))
    with pytest.raises(PreconditionError, match="/dev/dm-1"):
        memory.create(tmp_path / "a", image_bytes=1 << 20, swap=SwapRule.REFUSE)
    assert mounted == []
    memory.create(tmp_path / "b", image_bytes=1 << 20, swap=SwapRule.WARN)
    monkeypatch.setattr(memory, "swap_on_disk", lambda: ())
    memory.create(tmp_path / "c", image_bytes=1 << 20, swap=SwapRule.REFUSE)
    assert len(mounted) == 2
