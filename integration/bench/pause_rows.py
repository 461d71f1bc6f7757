"""The samples of the pause benchmark, kept as they come, and the rows made of them."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

PLAIN = "virsh-live-disk"
READING = "reading"  # not a way to capture: how long it takes to read a stream once
NOT_CONVERGING = "does not converge"
HOW = (
    "pause: from the first STOP to the last RESUME event, by QEMU's clock, in every mode. "
    "pause_parts_ms: medians of what vmsnap says its pause was made of. "
    "clone_running_s: from the source's RESUME until the clone was resumed in its proven fence. "
    "stream_read_s: reading a live stream under pgbench once from its tmpfs, thrown away; "
    "stream_read_into_memory_s: the same into fresh memory. "
    "tps_dip: the share of transactions missing in the five seconds after the source's RESUME against the seven before. "
    "peak_extra_ram_bytes: most memory of all the lab's processes and tmpfs during capture and clone, above that before. "
    "outside_gap_ms: longest time without an answer to a client in another namespace that asks every millisecond, from the "
    "capture's begin until the clone runs; outside_usual_gap_ms: the same in the seven seconds before. "
    "Values are medians where not said otherwise."
)


@dataclass(frozen=True)
class Sample:
    """One capture, or one reading of a stream."""

    mode: str
    ram_mib: int
    load: str
    at: str
    outcome: str
    pause_ms: float | None
    capture_s: float
    stream_bytes: int
    host_load: float
    parts_ms: dict[str, float] = field(default_factory=dict)  # what the driver says the pause was made of
    clone_running_s: float | None = None
    tps_before: float | None = None
    tps_after: float | None = None
    peak_extra_ram_bytes: int | None = None
    outside_gap_ms: float | None = None
    outside_usual_gap_ms: float | None = None
    stream_read_s: float | None = None
    stream_read_into_memory_s: float | None = None

    def __str__(self) -> str:
        told = [f"{name} {value}" for name, value in asdict(self).items() if value is not None]
        return f"{self.at[11:19]} {self.ram_mib} MiB, {self.load}, {self.mode}: {', '.join(told[4:])}"


@dataclass
class Run:
    """One run of the benchmark, in one or several parts: a file of JSON lines, the first of which says where it was."""

    path: Path
    name: str
    host: dict[str, object]
    samples: list[Sample] = field(default_factory=list)

    @staticmethod
    def open(path: Path, *, host: dict[str, object], take_up: bool) -> Run:
        """Begin a run, or take up the last one; refuses where it was measured under other circumstances."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if take_up and path.exists():
            first, *others = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            if differing := [key for key in host if host[key] != first["host"].get(key)]:
                msg = f"the last run cannot be continued: {', '.join(differing)} differ"
                raise SystemExit(msg)
            return Run(path, first["run"], host, [Sample(**line) for line in others])
        run = Run(path, secrets.token_hex(5), host)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        path.write_text(json.dumps({"run": run.name, "began": began, "host": host}) + "\n", encoding="utf-8")
        return run

    def add(self, sample: Sample) -> None:
        """Keep a sample, on disk when this returns."""
        self.samples.append(sample)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample)) + "\n")

    def lacks(self, ram_mib: int, load: str, mode: str, count: int) -> bool:
        """Whether there are fewer than `count` samples of this kind."""
        return len(self.of(ram_mib, load, mode)) < count

    def of(self, ram_mib: int, load: str, mode: str) -> list[Sample]:
        """The samples of one kind, oldest first."""
        return [s for s in self.samples if (s.ram_mib, s.load, s.mode) == (ram_mib, load, mode)]


def document(run: Run) -> dict[str, object]:
    """All that is known of a run, ready for JSON."""
    rows = [_row(run, ram_mib=ram, load=load, mode=mode) for ram, load, mode in _kinds(run.samples)]
    return {"run": run.name, "host": run.host, "how": HOW, "targets": targets(rows), "rows": rows}


def _kinds(samples: Iterable[Sample]) -> list[tuple[int, str, str]]:
    return sorted({(s.ram_mib, s.load, s.mode) for s in samples if s.mode != READING})


def _row(run: Run, *, ram_mib: int, load: str, mode: str) -> dict[str, object]:
    samples = run.of(ram_mib, load, mode)
    pauses = [s.pause_ms for s in samples if s.pause_ms is not None]
    readings = [s for s in run.samples if s.mode == READING and s.ram_mib == ram_mib]
    before, after = _values(samples, "tps_before"), _values(samples, "tps_after")
    return {
        "mode": mode,
        "ram_mib": ram_mib,
        "load": load,
        "runs": len(samples),
        "converged": len(pauses),
        "pause_p50_ms": _rank(pauses, 0.5),
        "pause_p90_ms": _rank(pauses, 0.9),
        "pause_max_ms": max(pauses, default=None),
        "pauses_ms": pauses,
        "pause_parts_ms": _parts(samples),
        "capture_s": _middle(samples, "capture_s"),
        "stream_bytes": _middle(samples, "stream_bytes"),
        "clone_running_s": _middle(samples, "clone_running_s"),
        "stream_read_s": _middle(readings, "stream_read_s"),
        "stream_read_into_memory_s": _middle(readings, "stream_read_into_memory_s"),
        "tps_before": round(mean(before), 1) if before else None,
        "tps_dip": round(1 - mean(after) / mean(before), 3) if before and after else None,
        "peak_extra_ram_bytes": max(_values(samples, "peak_extra_ram_bytes"), default=None),
        "outside_gap_ms": _middle(samples, "outside_gap_ms"),
        "outside_gap_max_ms": max(_values(samples, "outside_gap_ms"), default=None),
        "outside_usual_gap_ms": _middle(samples, "outside_usual_gap_ms"),
        "host_load": _middle(samples, "host_load"),
    }


def _values(samples: Iterable[Sample], name: str) -> list[float]:
    return [value for sample in samples if (value := getattr(sample, name)) is not None]


def _middle(samples: Iterable[Sample], name: str) -> float | None:
    values = _values(samples, name)
    return round(median(values), 2) if values else None


def _parts(samples: Iterable[Sample]) -> dict[str, float]:
    """The median of each part of the pause."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, ms in sample.parts_ms.items():
            found.setdefault(name, []).append(ms)
    return {name: round(median(values), 2) for name, values in found.items()}


def _rank(values: list[float], share: float) -> float | None:
    """The smallest value that so large a share of all does not exceed (nearest rank): no value between two measured ones."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None


def targets(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """What the figures ought to be, held against what they are. A target without a measurement is not met."""
    by_kind = {(row["ram_mib"], row["load"], row["mode"]): row for row in rows}
    found: list[dict[str, object]] = []

    def hold(what: str, value: float | None, limit: float) -> None:
        met = value is not None and value <= limit
        found.append({"what": what, "value": None if value is None else round(value, 3), "limit": limit, "met": met})

    for ram in sorted({int(str(row["ram_mib"])) for row in rows}):
        live, plain = (by_kind.get((ram, "pgbench", mode), {}) for mode in ("live", PLAIN))
        p50 = _number(live, "pause_p50_ms")
        hold(f"live under pgbench, {ram} MiB: p50 in ms", p50, 30)
        hold(f"live under pgbench, {ram} MiB: p90 in ms", _number(live, "pause_p90_ms"), 60)
        hold(f"live against plain libvirt, {ram} MiB: p50", _ratio(p50, _number(plain, "pause_p50_ms")), 0.1)
        hold(f"live, {ram} MiB: share of transactions missing afterwards", _number(live, "tps_dip"), 0.2)
        running = _number(live, "clone_running_s")
        hold(f"live, {ram} MiB: clone running, in readings", _ratio(running, _number(live, "stream_read_s")), 1.5)
        into = _ratio(running, _number(live, "stream_read_into_memory_s"))
        hold(f"live, {ram} MiB: clone running, in readings into memory", into, 1.5)
        for mode in ("live", "instant"):
            taken = [row for row in rows if (row["ram_mib"], row["mode"]) == (ram, mode) and row["converged"]]
            peaks = [peak for row in taken if (peak := _number(row, "peak_extra_ram_bytes")) is not None]
            if peaks:
                hold(f"{mode}, {ram} MiB: peak extra memory, in guests", max(peaks) / (ram << 20), 1.2)
                # Not all of a guest's memory is touched here; this is what it would come to if it were.
                largest = max(_number(row, "stream_bytes") or 1.0 for row in taken)
                hold(f"{mode}, {ram} MiB: peak extra memory, in streams", max(peaks) / largest, 1.2)
        instant = by_kind.get((ram, "memory-writer", "instant"), {})
        if instant:
            hold(f"instant under a memory writer, {ram} MiB: p50 in ms", _number(instant, "pause_p50_ms"), 200)
    return found


def _number(row: dict[str, object], name: str) -> float | None:
    value = row.get(name)
    return float(str(value)) if value is not None else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other
