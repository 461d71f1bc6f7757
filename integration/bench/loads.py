"""What the benchmark's guest does while it is captured: nothing, pgbench, or rewriting its memory without end."""

from __future__ import annotations

import base64
import re
import tempfile
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from statistics import mean
from typing import Self

from integration.bench.programs import compiled
from integration.lab.commands import LabError
from integration.lab.guest import POSTGRESQL_BIN, LabGuest

_SOURCE = Path(__file__).with_name("memory_load.c")
_PROGRAM = "/run/bench-memory"
_PIECE_BYTES = 96 << 10  # the agent gives up over a request of a megabyte
_READY = "/run/bench-memory.ready"
_MEMORY_UNIT = "bench-memory"
_PGBENCH_UNIT = "bench-pgbench"
_PGBENCH_LOG = "/run/bench-pgbench.log"
# What Debian and PostgreSQL want for themselves.
_LEFT_MIB = 128
_FILL_SHARE = 0.75


class Load(StrEnum):
    """What the guest does. The memory that it holds is touched under each of them."""

    IDLE = "idle"
    PGBENCH = "pgbench"
    WRITER = "memory-writer"


def fill_mib(ram_mib: int) -> int:
    """How much memory is touched in a guest of that size, beside what its system uses."""
    return round(ram_mib * _FILL_SHARE) - _LEFT_MIB


def fill_memory(guest: LabGuest) -> float:
    """Put the program into the guest, and let it touch its memory; returns the seconds that took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        content = compiled(_SOURCE, folder=Path(folder)).read_bytes()
    for start in range(0, len(content), _PIECE_BYTES):
        text = base64.b64encode(content[start : start + _PIECE_BYTES]).decode()
        guest.run(["sh", "-c", f"base64 -d >>{_PROGRAM}"], text=text)
    guest.run(["chmod", "755", _PROGRAM])
    size = str(fill_mib(guest.spec.memory_mib))
    # The kernel must not end it for what the others want.
    guest.run(
        ["systemd-run", f"--unit={_MEMORY_UNIT}", "--property=OOMScoreAdjust=-1000", _PROGRAM, size, _READY],
    )
    deadline = time.monotonic() + 60 * guest.lab.time_factor
    while guest.exec(["test", "-e", _READY]).exit_status != 0:
        if time.monotonic() > deadline:
            raise LabError(f"the memory of {guest.name!r} is not touched yet")
        time.sleep(0.5)
    return time.monotonic() - began


class Running:
    """One load while the block runs."""

    def __init__(self, guest: LabGuest, load: Load) -> None:
        self._guest = guest
        self._load = load
        self._clock_ahead_s = 0.0

    def __enter__(self) -> Self:
        if self._load is Load.WRITER:
            self._signal("SIGUSR1")
        elif self._load is Load.PGBENCH:
            self._start_pgbench()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(LabError):
            if self._load is Load.WRITER:
                self._signal("SIGUSR2")
            elif self._load is Load.PGBENCH:
                self._guest.exec(["systemctl", "stop", f"{_PGBENCH_UNIT}.service"])

    def _signal(self, name: str) -> None:
        self._guest.run(["systemctl", "kill", f"--signal={name}", f"{_MEMORY_UNIT}.service"])

    def _start_pgbench(self) -> None:
        properties = [f"--property=StandardError=truncate:{_PGBENCH_LOG}", "--property=User=postgres"]
        load = [f"{POSTGRESQL_BIN}/pgbench", "--client=4", "--jobs=1", "--time=86400", "--no-vacuum"]
        load += ["--progress=1", "--progress-timestamp", "bench"]
        self._guest.run(["systemd-run", f"--unit={_PGBENCH_UNIT}", "--collect", *properties, *load])
        before = time.time()
        there = float(self._guest.run(["date", "+%s.%N"]))
        self._clock_ahead_s = there - (before + time.time()) / 2

    def tps(self, *, begin_s: float, end_s: float) -> float | None:
        """Transactions per second between two times of the host's clock, from whole seconds; None without pgbench."""
        if self._load is not Load.PGBENCH:
            return None
        lines = self._guest.exec(["tail", "-n", "300", _PGBENCH_LOG]).stdout
        found = re.findall(r"^progress: ([0-9.]+) s, ([0-9.]+) tps", lines, flags=re.MULTILINE)
        # A line is about the second before its time.
        middles = ((float(at) - self._clock_ahead_s - 0.5, float(tps)) for at, tps in found)
        inside = [tps for at, tps in middles if begin_s <= at <= end_s]
        return mean(inside) if inside else None
