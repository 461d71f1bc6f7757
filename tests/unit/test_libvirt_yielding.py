"""Clones give way to production for a while, and get the weight of their policy then."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.libvirt_domains import RUN
from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.clones import clone_of
from vmsnap.hypervisors.libvirt.yielding import GivingWay
from vmsnap.model.ids import RunId

CLONE = clone_of(RUN, guest="db1")
V1 = ("{root}/cpu", "cgroup cgroup rw,cpu", "4:cpu:/machine/qemu-2-{name}.libvirt-qemu/emulator", "cpu.shares")
V2 = (
    "{root}",
    "cgroup2 cgroup2 rw",
    "0::/machine.slice/machine-qemu\\x2d2\\x2d{name}.scope/libvirt/emulator",
    "cpu.weight",
)


@dataclass
class Host:
    """A host's `/proc`, libvirt's pid files, and the group of a clone, all of plain files."""

    proc: Path
    pid_files: Path
    group: Path
    weight: Path

    def begin(self) -> None:
        """The clone's process begins, and libvirt writes down which it is."""
        self.pid_files.mkdir()
        (self.pid_files / f"{CLONE.name}.pid").write_text("42")

    @property
    def idle(self) -> str:
        return (self.group / "cpu.idle").read_text()

    def way(self, *, seconds: float) -> Noted:
        return Noted(CLONE.name, run=CLONE.run, seconds=seconds, pid_files=self.pid_files, proc=self.proc)


class Noted(GivingWay):
    """Knows what was written, in its order. Like the kernel, it takes a group's weight away whenever it becomes idle or not."""

    def __init__(self, name: str, *, run: RunId, seconds: float, pid_files: Path, proc: Path) -> None:
        super().__init__(name, run=run, seconds=seconds, pid_files=pid_files, proc=proc)
        self.written: list[str] = []

    def _write(self, file: Path, text: str) -> None:
        if file.name == "cpu.idle" and file.exists() and file.read_text() != text:
            for name in ("cpu.shares", "cpu.weight"):
                if file.with_name(name).exists():
                    file.with_name(name).write_text("0\n" if text == "1" else "100\n")
        super()._write(file, text)
        self.written.append(text if file.name == "cpu.idle" else f"weight {text.strip()}")

    def until_written(self, *texts: str) -> None:
        until(lambda: len(self.written) >= len(texts))
        assert self.written == list(texts)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(params=[V1, V2], ids=["version 1", "version 2"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    mount, kind, line, weight = request.param
    name = CLONE.name if kind.startswith("cgroup ") else CLONE.name.replace("-", "\\x2d")
    root = Path(mount.format(root=tmp_path / "groups"))
    group = root / line.partition(":/")[2].format(name=name).partition("/emulator")[0].removesuffix("/libvirt")
    inner = root / line.partition(":/")[2].format(name=name)
    inner.mkdir(parents=True)
    for folder in (group, *([inner] if inner != group else [])):
        (folder / "cpu.idle").write_text("0")
        (folder / weight).write_text("100")
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    fields, _, options = kind.rpartition(" ")
    (proc / "self" / "mountinfo").write_text(f"25 20 0:22 / {root} rw - {fields} {options}\n")
    (proc / "42").mkdir()
    (proc / "42" / "cgroup").write_text(f"{line.format(name=name)}\n")
    return Host(proc=proc, pid_files=tmp_path / "pids", group=group, weight=group / weight)


def test_a_clone_gives_way_from_its_beginning_and_not_for_ever(host: Host) -> None:
    way = host.way(seconds=0.2)
    way.begin()
    time.sleep(0.05)
    assert way.written == []
    host.begin()
    way.until_written("1", "0")
    with way.weighed():
        host.weight.write_text("6\n")
    assert (host.idle, host.weight.read_text()) == ("0", "6\n"), "its time was over already"
    way.end()


def test_a_clone_that_never_begins_is_not_waited_for(host: Host) -> None:
    way = host.way(seconds=60)
    way.begin()
    way.end()
    host.begin()
    time.sleep(0.05)
    assert host.idle == "0"


@pytest.mark.parametrize("loaded", [True, False])
def test_a_weight_is_taken_by_a_group_that_is_not_idle_and_in_effect_after_a_while(host: Host, *, loaded: bool) -> None:
    host.begin()
    way = host.way(seconds=2)
    if loaded:
        way.begin()
        way.until_written("1")
    with way.weighed():
        assert host.idle == "0"
        host.weight.write_text("6\n")
    way.until_written(*(["1", "0", "1", "0", "weight 6"] if loaded else ["0", "1", "0", "weight 6"]))
    assert (host.idle, host.weight.read_text()) == ("0", "6\n")
    way.end()


@pytest.mark.parametrize("complete", [True, False])
def test_a_clone_that_is_to_end_gives_way_no_longer(host: Host, *, complete: bool) -> None:
    host.begin()
    way = host.way(seconds=60)
    way.begin()
    way.until_written("1")
    if complete:
        with way.weighed():
            host.weight.write_text("6\n")
        assert host.idle == "1"
    way.cease()
    assert (host.idle, host.weight.read_text()) == ("0", "6\n" if complete else "100\n")
    if not complete:
        # It may be complete at this very moment.
        with way.weighed():
            host.weight.write_text("6\n")
    assert (host.idle, host.weight.read_text()) == ("0", "6\n")
    way.end()


def test_a_clone_of_a_process_that_died_gives_way_no_longer(host: Host) -> None:
    host.begin()
    died = host.way(seconds=60)
    died.begin()
    died.until_written("1")
    host.way(seconds=0).cease()
    assert host.idle == "0"
    died.end()


def test_a_clone_that_ends_in_between_is_nobodys_failure(host: Host) -> None:
    host.begin()
    way = host.way(seconds=0.1)
    way.begin()
    until(lambda: "1" in way.written)
    with way.weighed():
        shutil.rmtree(host.group)
    time.sleep(0.2)
    way.cease()
    way.end()
    assert not host.group.exists()


def test_a_clone_whose_weight_cannot_be_told_does_not_give_way(host: Host) -> None:
    host.begin()
    way = host.way(seconds=60)
    with way.weighed():
        host.weight.unlink()
    time.sleep(0.05)
    assert host.idle == "0"
    way.end()


@pytest.mark.parametrize("without", ["process", "group of its own", "idle groups", "while"])
def test_without_idle_groups_or_a_while_the_weight_is_in_effect_at_once(host: Host, without: str) -> None:
    if without != "process":
        host.begin()
    if without == "group of its own":
        (host.proc / "42" / "cgroup").write_text("4:cpu:/\n0::/\n")
    if without == "idle groups":
        (host.group / "cpu.idle").unlink()
    way = host.way(seconds=0 if without == "while" else 60)
    way.begin()
    with way.weighed():
        host.weight.write_text("6")
    until(lambda: not way._thread.is_alive())
    assert host.weight.read_text() == "6"
    assert without == "idle groups" or host.idle == "0"
    way.end()


def test_a_weight_that_cannot_be_set_is_told(host: Host) -> None:
    host.begin()
    with pytest.raises(DriverError), host.way(seconds=60).weighed():
        raise DriverError("no")
    assert host.idle == "0"
