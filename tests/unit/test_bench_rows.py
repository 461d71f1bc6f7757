"""The rows of the pause benchmark: what is measured is kept, and what was not measured meets no target."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.bench.pause_rows import NOT_CONVERGING, PLAIN, READING, Run, Sample, document

HOST: dict[str, object] = {"boot": "one", "qemu": 7}


def sample(
    mode: str, pause_ms: float | None = None, *, load: str = "pgbench", reading_s: float | None = None
) -> Sample:
    return Sample(
        mode=mode,
        ram_mib=1024,
        load=load,
        at="2026-11-21T12:00:00+00:00",
        outcome=NOT_CONVERGING if pause_ms is None else "captured",
        pause_ms=pause_ms,
        capture_s=1.0,
        stream_bytes=1,
        host_load=0.5,
        tps_before=100.0,
        tps_after=90.0,
        clone_running_s=3.0,
        stream_read_s=reading_s,
    )


def run_of(path: Path, *samples: Sample) -> Run:
    run = Run.open(path, host=HOST, take_up=False)
    for one in samples:
        run.add(one)
    return run


def rows_of(run: Run) -> list[dict[str, object]]:
    rows = document(run)["rows"]
    assert isinstance(rows, list)
    return rows


def test_a_percentile_is_a_measured_value(tmp_path: Path) -> None:
    run = run_of(tmp_path / "samples", *(sample("live", float(ms)) for ms in (30, 10, 20, 50, 40)))
    (row,) = rows_of(run)
    assert [row[f"pause_{name}_ms"] for name in ("p50", "p90", "max")] == [30, 50, 50]
    assert (row["runs"], row["converged"], row["tps_dip"]) == (5, 5, 0.1)


def test_a_guest_that_never_converged_has_no_pause(tmp_path: Path) -> None:
    run = run_of(tmp_path / "samples", sample(PLAIN, load="memory-writer"), sample("live", load="memory-writer"))
    assert [(row["mode"], row["pause_p50_ms"], row["converged"]) for row in rows_of(run)] == [
        ("live", None, 0),
        (PLAIN, None, 0),
    ]


def test_targets_hold_modes_against_each_other_and_readings(tmp_path: Path) -> None:
    run = run_of(
        tmp_path / "samples",
        sample(PLAIN, 400),
        sample("live", 30),
        sample(READING, 31, reading_s=2.5),
        sample("live", 50),
    )
    targets = document(run)["targets"]
    assert isinstance(targets, list)
    met = {target["what"].split(": ")[1]: target["met"] for target in targets}
    assert met == {
        "p50 in ms": True,
        "p90 in ms": True,
        "p50": True,
        "share of transactions missing afterwards": True,
        "clone running, in readings": True,
        "clone running, in readings into memory": False,  # not measured
    }


def test_a_run_is_taken_up_where_it_stopped_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    begun = run_of(path, sample("live", 10))
    again = Run.open(path, host=HOST, take_up=True)
    assert (again.name, again.samples) == (begun.name, begun.samples)
    assert not again.lacks(1024, "pgbench", "live", 1)
    assert again.lacks(1024, "pgbench", "live", 2)
    with pytest.raises(SystemExit, match="boot differ"):
        Run.open(path, host={**HOST, "boot": "two"}, take_up=True)
    assert Run.open(path, host=HOST, take_up=False).samples == []
