"""What is looked at while a capture runs, the same for every mode: memory of the host, and the guest from outside."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from types import TracebackType
from typing import Self

from integration.bench.programs import compiled
from integration.lab.commands import LabError, run
from integration.lab.lab import Lab

_PERIOD_S = 0.05
_MEMORY = re.compile(rb"^Rss(?:Anon|Shmem):\s*(\d+) kB$", re.MULTILINE)
_CLIENT = Path(__file__).with_name("outside.c")


class ExtraMemory:
    """The most memory that all processes of the lab and their tmpfs took while the block ran, above what they had before.

    Counted are anonymous and shared pages of processes (proc(5), status) and pages in tmpfs; not the page cache, which the
    kernel gives up by itself. A page in a tmpfs that a process also maps would count twice; none does here.

    A process of its own looks: in this one it would hold up those who capture.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        argv = [sys.executable, "-m", "integration.bench.observers"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise LabError(f"the look at the memory ended with exit status {self._process.wait()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        out, _ = self._process.communicate("", timeout=30)
        self.peak_bytes = int(out)


def _look_at_memory() -> None:
    """Look until stdin is closed, then print the most that was taken above what there was at first."""
    before = most = _lab_memory_bytes()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], _PERIOD_S)[0]:
        most = max(most, _lab_memory_bytes())
    print(most - before)


def _lab_memory_bytes() -> int:
    kib = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                # Kernel threads have no such lines.
                kib += sum(map(int, _MEMORY.findall(Path(entry.path, "status").read_bytes())))
    return kib * 1024 + sum(_used_bytes(mount) for mount in _tmpfs_mounts())


def _tmpfs_mounts() -> set[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if line.split()[2] == "tmpfs" and line.split()[1].startswith("/run")}


def _used_bytes(mount: str) -> int:
    with suppress(OSError):  # unmounted meanwhile
        status = os.statvfs(mount)
        return (status.f_blocks - status.f_bfree) * status.f_frsize
    return 0


@dataclass(frozen=True)
class Silence:
    """A time in which the guest was asked and did not answer."""

    began_s: float  # seconds since the epoch
    seconds: float


class OutsideView:
    """A client in a network namespace of its own on the production bridge, which asks the guest every millisecond."""

    def __init__(self, lab: Lab, *, guest_address: str) -> None:
        self._namespace = "bench-outside"
        self._address = guest_address
        self._lab = lab
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        client = compiled(_CLIENT, folder=Path(self._folder.name))
        network = IPv4Interface(self._lab.gateway).network
        mine = f"{network.network_address + 250}/{network.prefixlen}"
        inside = ["ip", "-n", self._namespace]
        run(["ip", "netns", "add", self._namespace])
        run(["ip", "link", "add", "bench0", "type", "veth", "peer", "name", "eth0", "netns", self._namespace])
        run(["ip", "link", "set", "bench0", "master", self._lab.bridge, "up"])
        run([*inside, "address", "add", mine, "dev", "eth0"])
        run([*inside, "link", "set", "eth0", "up"])
        argv = ["ip", "netns", "exec", self._namespace, str(client), self._address]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        run(["ip", "link", "del", "bench0"])
        run(["ip", "netns", "del", self._namespace])
        self._folder.cleanup()

    def silences(self) -> list[Silence]:
        """Stop asking; returns every time longer than two milliseconds in which no answer came."""
        assert self._process is not None
        out, _ = self._process.communicate("", timeout=30)
        if self._process.returncode != 0:
            raise LabError(f"the client outside ended with exit status {self._process.returncode}")
        return [Silence(*map(float, line.split())) for line in out.splitlines()]


def longest_ms(silences: list[Silence], *, begin_s: float, end_s: float) -> float:
    """The longest silence that overlaps a span of time, in milliseconds; 0 where there is none."""
    lengths = [s.seconds for s in silences if s.began_s < end_s and s.began_s + s.seconds > begin_s]
    return round(max(lengths, default=0.0) * 1000, 1)


if __name__ == "__main__":
    _look_at_memory()
