"""How long a guest stands still: plain libvirt, `live` and `instant`, by the guest's size and what it does meanwhile.

Every sample is written to build/bench/pause.samples.jsonl when it was taken, and the rows are made of the samples of one
run. A run may be done in parts, on the same host and with the same versions: `CONTINUE=1` takes it up, and passes over what
it has.

    make bench NAME=pause                                     everything: about forty minutes under software emulation
    make bench NAME=pause RAM=1024 LOADS=pgbench RUNS=2       a part of it, as a run of its own
    make bench NAME=pause RAM=8192 MODES=live CONTINUE=1      one more part of the last run
"""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import libvirt
from rich.console import Console

from integration.bench.loads import Load, Running, fill_memory, fill_mib
from integration.bench.observers import ExtraMemory, OutsideView, longest_ms
from integration.bench.pause_rows import NOT_CONVERGING, PLAIN, READING, Run, Sample, document
from integration.bench.plain import plain_capture
from integration.lab import host_settings
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import Cancel, DriverRun, run_of
from vmsnap.errors import DeadlineError, NotConvergingError
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.hypervisors.libvirt.events import Pause, PauseRecorder
from vmsnap.model.capture import Capture, CaptureChoice, CaptureMode, CaptureSettings, ModeChoice

RAM_MIB = (1024, 4096, 8192)
MODES = (PLAIN, CaptureMode.LIVE.value, CaptureMode.INSTANT.value)
RUNS = 3
GUEST = "bench-pause"
FOLDER = Path("build/bench")
BEFORE_S = 8.0
AFTER_S = 6.5
# What plain libvirt may take of a guest that does not converge. More says no more, and the disk has to take it all.
WRITER_LIMIT_S = 30.0
WRITER_LIMIT_SHARE = 1.5
_PIECE_BYTES = 1 << 20
# What is printed of the rows; the file has more.
SHOWN = (
    "mode",
    "ram_mib",
    "load",
    "runs",
    "pause_p50_ms",
    "pause_p90_ms",
    "pause_max_ms",
    "clone_running_s",
    "tps_dip",
    "outside_gap_ms",
)


@dataclass(frozen=True)
class Wanted:
    """What the settings of one call ask for."""

    ram_mib: tuple[int, ...]
    loads: tuple[Load, ...]
    modes: tuple[str, ...]
    runs: int
    take_up: bool

    @staticmethod
    def from_environment() -> Wanted:
        """Read RAM, LOADS, MODES, RUNS and CONTINUE: lists are parted by blanks."""

        def words(name: str) -> list[str]:
            return os.environ.get(name, "").split()

        modes = tuple(words("MODES")) or MODES
        if unknown := set(modes) - set(MODES):
            msg = f"MODES: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}"
            raise SystemExit(msg)
        return Wanted(
            ram_mib=tuple(int(word) for word in words("RAM")) or RAM_MIB,
            loads=tuple(Load(word) for word in words("LOADS")) or tuple(Load),
            modes=modes,
            runs=int(os.environ.get("RUNS") or RUNS),
            take_up=bool(os.environ.get("CONTINUE")),
        )


def measure(lab: Lab, console: Console) -> dict[str, object]:
    """Take the samples that are asked for and still missing; return the rows of the whole run."""
    wanted = Wanted.from_environment()
    run = Run.open(FOLDER / "pause.samples.jsonl", host=_host(lab), take_up=wanted.take_up)
    for ram_mib in wanted.ram_mib:
        todo = [
            (load, mode)
            for load in wanted.loads
            for mode in wanted.modes
            if run.lacks(ram_mib, load, mode, wanted.runs)
        ]
        if todo:
            with (
                host_settings.lent(host_settings.USERFAULTFD),
                LabGuest(lab, GuestSpec(name=GUEST, memory_mib=ram_mib)) as guest,
            ):
                console.print(f"{ram_mib} MiB: {fill_mib(ram_mib)} MiB touched in {fill_memory(guest):.0f} s")
                _measure_guest(guest, run=run, wanted=wanted, console=console)
    return document(run)


def _measure_guest(guest: LabGuest, *, run: Run, wanted: Wanted, console: Console) -> None:
    ram_mib = guest.spec.memory_mib
    address = guest.address()
    for load in wanted.loads:
        with Running(guest, load) as running:
            for number in range(wanted.runs):
                for mode in wanted.modes:
                    if run.lacks(ram_mib, load, mode, number + 1):
                        sample = _sample(guest, mode=mode, load=load, running=running, address=address)
                        run.add(sample)
                        console.print(str(sample), highlight=False)
                if "live" in wanted.modes and load is Load.PGBENCH and run.lacks(ram_mib, load, READING, number + 1):
                    run.add(_reading(guest, load, address=address))


def _host(lab: Lab) -> dict[str, object]:
    """What must be the same for samples to be of one run."""
    version = libvirt.open("qemu:///system")
    numbers = (version.getLibVersion(), version.getVersion())
    version.close()
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "kernel": platform.release(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "cpu": model.split(": ")[1],
        "cpus": os.cpu_count(),
        "accelerator": lab.accelerator,
        "page_reporting_order": host_settings.value_of(host_settings.MEMORY_KEPT),
        "libvirt": numbers[0],
        "qemu": numbers[1],
        "commit": commit,
    }


@dataclass
class Taken:
    """What one capture came to, before it is put together with what was seen meanwhile."""

    pause: Pause | None = None
    stream_bytes: int = 0
    parts_ms: dict[str, float] = field(default_factory=dict)
    capture_s: float = 0.0
    clone_running_s: float | None = None


def _sample(guest: LabGuest, *, mode: str, load: Load, running: Running, address: str) -> Sample:
    """Take one sample. The guest is as before when this returns."""
    with ExitStack() as stack:
        outside = stack.enter_context(OutsideView(guest.lab, guest_address=address))
        time.sleep(BEFORE_S)
        with ExtraMemory() as memory:
            began_s = time.time()
            taken = stack.enter_context(_plain(guest, load) if mode == PLAIN else _vmsnap(guest, mode))
            ended_s = time.time()
            resumed_s = ended_s if taken.pause is None else taken.pause.resumed.timestamp()
            time.sleep(max(0.0, resumed_s + AFTER_S - time.time()))
        silences = outside.silences()
        before = running.tps(begin_s=began_s - BEFORE_S + 1, end_s=began_s)
        after = running.tps(begin_s=resumed_s, end_s=resumed_s + 5)
    pause = taken.pause
    return Sample(
        mode=mode,
        ram_mib=guest.spec.memory_mib,
        load=load.value,
        at=datetime.fromtimestamp(began_s, tz=UTC).isoformat(timespec="seconds"),
        outcome="captured" if pause is not None else NOT_CONVERGING,
        pause_ms=None if pause is None else _ms(pause.resumed - pause.stopped),
        capture_s=round(taken.capture_s, 2),
        stream_bytes=taken.stream_bytes,
        parts_ms=taken.parts_ms,
        clone_running_s=taken.clone_running_s,
        tps_before=before,
        tps_after=after,
        peak_extra_ram_bytes=memory.peak_bytes,
        outside_gap_ms=longest_ms(silences, begin_s=began_s, end_s=ended_s),
        outside_usual_gap_ms=longest_ms(silences, begin_s=began_s - BEFORE_S + 1, end_s=began_s),
        host_load=round(os.getloadavg()[0], 1),
    )


def _ms(span: timedelta) -> float:
    return round(span.total_seconds() * 1000, 2)


@contextmanager
def _plain(guest: LabGuest, load: Load) -> Iterator[Taken]:
    if load is Load.WRITER:
        size = round(WRITER_LIMIT_SHARE * guest.spec.memory_mib) << 20
        taken = plain_capture(guest, limit_s=WRITER_LIMIT_S, limit_bytes=size)
    else:
        taken = plain_capture(guest)
    yield Taken(pause=taken.pause, stream_bytes=taken.stream_bytes, capture_s=taken.seconds)


@contextmanager
def _vmsnap(guest: LabGuest, mode: str) -> Iterator[Taken]:
    """Capture, and let the clone run in its fence while the block lasts."""
    # The policy's own defaults, but for the emulation's sake.
    settings = CaptureSettings(
        mode=CaptureChoice(mode), allow_emulation=True, timeout=timedelta(seconds=120), min_overlay_free_bytes=1 << 20
    )
    with run_of(guest.lab, guest, settings) as run:
        run.plan = replace(run.plan, choice=ModeChoice(mode=CaptureMode(mode), reason="the benchmark asks for it"))
        run.prepare()
        taken = Taken()
        began = time.monotonic()
        try:
            taken.pause, capture = _captured(guest, run)
        except (NotConvergingError, DeadlineError):
            taken.capture_s = time.monotonic() - began
        else:
            taken.capture_s = time.monotonic() - began
            taken.stream_bytes = capture.ram_bytes
            taken.parts_ms = {part.name: round(part.ms, 2) for part in capture.parts}
            clone = run.restore()
            run.driver.resume_clone(clone, proof=run.network.prove(run.fence))
            taken.clone_running_s = round(time.time() - taken.pause.resumed.timestamp(), 2)
        yield taken


def _captured(guest: LabGuest, run: DriverRun) -> tuple[Pause, Capture]:
    """Capture; returns the pause as the bench itself saw it in QEMU's events, not as the driver tells it."""
    connection = Connection("qemu:///system")
    try:
        with PauseRecorder(connection.get(), connection.domain(guest.name)) as recorder:
            capture = run.capture(Cancel())
            pause = recorder.pause(timeout_seconds=10)
    finally:
        connection.close()
    assert pause is not None
    return pause, capture


def _reading(guest: LabGuest, load: Load, *, address: str) -> Sample:
    """How long it takes to read a `live` stream once: thrown away, and into fresh memory as a clone has to take it.

    The host is as busy meanwhile as where a clone takes it: the guest is asked from outside all the time.
    """
    settings = CaptureSettings(allow_emulation=True, min_overlay_free_bytes=1 << 20)
    with OutsideView(guest.lab, guest_address=address), run_of(guest.lab, guest, settings) as run:
        run.prepare()
        began_s = time.time()
        capture = run.capture(Cancel())
        (image,) = Path("/run/vmsnap").glob("*/memory/ram.save")
        thrown_away_s = _timed(lambda: _read(image, into=bytearray(_PIECE_BYTES)))
        with mmap.mmap(-1, image.stat().st_size) as memory:
            kept_s = _timed(lambda: _read(image, into=memory))
    return Sample(
        mode=READING,
        ram_mib=guest.spec.memory_mib,
        load=load.value,
        at=datetime.fromtimestamp(began_s, tz=UTC).isoformat(timespec="seconds"),
        outcome="captured",
        pause_ms=round(capture.pause_ms, 2),
        capture_s=round(capture.seconds, 2),
        stream_bytes=capture.ram_bytes,
        stream_read_s=round(thrown_away_s, 2),
        stream_read_into_memory_s=round(kept_s, 2),
        host_load=round(os.getloadavg()[0], 1),
    )


def _timed(action: Callable[[], None]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _read(image: Path, *, into: bytearray | mmap.mmap) -> None:
    room = memoryview(into)
    position = 0
    try:
        with image.open("rb", buffering=0) as file:
            while count := file.readinto(room[position : position + _PIECE_BYTES]):
                position = 0 if isinstance(into, bytearray) else position + count
    finally:
        room.release()
