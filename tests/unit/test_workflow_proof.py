"""The proof refuses what it has seen nothing of."""

from __future__ import annotations

from datetime import timedelta

import pytest

from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.errors import NotCleanError
from vmsnap.model.drain import FileSystemState
from vmsnap.model.ids import RunId
from vmsnap.ports.disks import DiskView, FileContent, FileRequest
from vmsnap.state.clock import SystemClock
from vmsnap.workflow.proof import prove_clean


class OneCleanFileSystem:
    def file_systems(self, views: tuple[DiskView, ...], *, timeout: timedelta) -> tuple[FileSystemState, ...]:
        return (FileSystemState(disk="vda", kind="ext4", uuid="1", clean=True, observed="state clean"),)

    def read_files(
        self, views: tuple[DiskView, ...], *, requests: tuple[FileRequest, ...], timeout: timedelta
    ) -> tuple[FileContent, ...]:
        return ()


def test_no_instance_is_no_proof() -> None:
    with pytest.raises(NotCleanError) as caught:
        prove_clean(
            RunId("0123456789"),
            engine=PostgreSQL(),
            stopped=(),
            views=(),
            inspector=OneCleanFileSystem(),
            shut_down_by="guest agent",
            clock=SystemClock(),
        )
    assert "no database instance" in str(caught.value.details)
