"""What earlier pauses tell of the next."""

from __future__ import annotations

from datetime import timedelta

import pytest

from vmsnap.model.capture import MEMORY_PART
from vmsnap.model.ids import RunId
from vmsnap.model.manifest import DiskRecord, PausePartRecord, Snapshot
from vmsnap.testing.store_contract import NOON, sample_manifest
from vmsnap.workflow.pauses import usual_rest_ms

DISK = DiskRecord(
    target="vda", image="vda.raw", digests="vda.digests", digests_sha256="0", size_bytes=1, data_bytes=0, new_bytes=0
)


def after(day: int, *, rest_ms: float | None) -> Snapshot:
    """A snapshot of that day, whose pause took so long beside the copying of memory; None: its parts are not known."""
    manifest = sample_manifest(RunId(f"{day:010x}"), disks=(DISK,), captured=NOON + timedelta(days=day))
    known = {MEMORY_PART: 7.0, "resume": rest_ms} if rest_ms is not None else {}
    parts = tuple(PausePartRecord(name=name, ms=ms) for name, ms in known.items())
    return Snapshot(
        manifest=manifest.model_copy(update={"capture": manifest.capture.model_copy(update={"parts": parts})})
    )


@pytest.mark.parametrize(
    ("rests", "usual"),
    [
        ((), None),
        ((None,), None),
        ((30.0,), 30.0),
        ((None, 30.0), 30.0),
        ((20.0, 30.0), 25.0),
        # One slow pause does not count, and neither do old ones.
        ((20.0, 900.0, 30.0), 30.0),
        ((900.0, 900.0, 20.0, 30.0, 25.0), 25.0),
    ],
)
def test_the_rest_of_the_next_pause_is_the_median_of_the_last_three(
    rests: tuple[float | None, ...], usual: float | None
) -> None:
    found = [after(day, rest_ms=rest) for day, rest in enumerate(rests)]
    assert usual_rest_ms(found) == usual
    assert usual_rest_ms(reversed(found)) == usual
