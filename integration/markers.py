"""What the markers of a client outside a guest say of a snapshot: it is of one instant, and nothing acknowledged is lost."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from integration.lab.client import LabClient
from integration.lab.guest import LabGuest


def require_instant(client: LabClient, vm: LabGuest, capture: dict[str, Any]) -> None:
    """All markers acknowledged before the capture are in a test VM of its snapshot, and none that was begun after it."""
    found = {int(line) for line in vm.psql("SELECT n FROM markers").splitlines()}
    stopped = datetime.fromisoformat(capture["captured"])
    resumed = stopped + timedelta(milliseconds=capture["pause_ms"])
    expected = {m.number for m in client.markers if m.acknowledged_at is not None and m.acknowledged_at < stopped}
    impossible = {m.number for m in client.markers if m.began_at > resumed}
    assert expected, "the client committed before the capture"
    assert impossible, "the client went on after the capture"
    assert expected <= found
    assert not impossible & found
