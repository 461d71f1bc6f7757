"""Whole backups over the wire: every script crosses WinRM, with its faults, and nothing is left, not even a shell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import backup, destroy, order, provision, recovers, simply
from vmsnap.hypervisors.hyperv.commands import Commands, script_names, script_text
from vmsnap.hypervisors.hyperv.connection import HostConnection, Login
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.tags import RunFolders
from vmsnap.hypervisors.hyperv.transport import Transport
from vmsnap.testing.faults import Faults
from vmsnap.testing.hyperv.endpoint import PASSWORD, USER, Endpoint, running
from vmsnap.testing.hyperv.failures import Language, Speech
from vmsnap.testing.hyperv.running import TwinDispatcher
from vmsnap.testing.hyperv.wirefaults import Harm, WireFault
from vmsnap.testing.hyperv.world import EXPORTS, HyperVWorld
from vmsnap.workflow.world import World


class WireWorld(HyperVWorld):
    """The installation of ``HyperVWorld``, its driver beyond WinRM on the loopback interface."""

    def __init__(self, folder: Path, *, disks: int = 1) -> None:
        self.endpoint: Endpoint | None = None
        self.lines: list[Commands] = []
        super().__init__(folder, disks=disks, speech=Speech(language=Language.GERMAN))

    def process(self, faults: Faults | None = None) -> World:
        assert faults is None, "deaths are not for threads that serve"
        return super().process(None)

    def connect(self) -> Host:
        assert self.endpoint is not None
        connection = HostConnection(
            host="127.0.0.1",
            port=self.endpoint.port,
            tls=False,
            login=Login(user=USER, password=PASSWORD),
            connect_timeout=timedelta(seconds=2),
            operation_timeout=timedelta(seconds=5),
        )
        self.lines.append(Commands(Transport(connection)))
        return Host(self.lines[-1], folders=RunFolders(root=EXPORTS, mounted=str(self.machine.files.local(EXPORTS))))

    def end(self) -> None:
        super().end()
        for line in self.lines:
            line.close()
        self.lines.clear()


@contextmanager
def _served(folder: Path, *, disks: int = 1) -> Iterator[WireWorld]:
    lab = WireWorld(folder, disks=disks)
    with running(TwinDispatcher(lab.machine)) as endpoint:
        lab.endpoint = endpoint
        yield lab
        lab.end()
        assert endpoint.service.open_shells == 0


def test_a_backup_and_a_test_vm_over_the_wire(tmp_path: Path) -> None:
    with _served(tmp_path, disks=2) as lab:
        for work in (backup(), provision(), destroy()):
            outcome = simply(lab, work)
            assert outcome.error is None, (outcome.error, getattr(outcome.error, "details", ""))
            assert order(lab) == []
        assert lab.machine.leftovers() == []
        assert len(lab.store.snapshots("db")) == 1


# The in-process tests lose the answer to each script in turn; these are the ones that take long or cannot be repeated.
SCRIPTS = ("export_machine", "import_clone", "request_shutdown")
HARMS = {
    "done, and the line breaks": ("Command", Harm.CUT_AFTER),
    "its output is lost": ("Receive", Harm.CUT_AFTER),
}


@pytest.mark.parametrize("harm", list(HARMS))
def test_the_line_breaks_at_each_script(tmp_path: Path, harm: str) -> None:
    operation, how = HARMS[harm]
    problems = []
    assert set(SCRIPTS) <= set(script_names())
    for script in SCRIPTS:
        with _served(tmp_path / script) as lab:
            assert lab.endpoint is not None
            opening = script_text(script).splitlines()[0]
            lab.endpoint.faults.add(WireFault(harm=how, operation=operation, containing=opening))
            outcome = simply(lab, backup())
            found = [] if lab.endpoint.faults.struck else ["it was not struck"]
            found += [f"harm: {text}" for text in lab.host.harm()]
            if outcome.error is None and len(lab.store.snapshots("db")) != 1:
                found.append("done, and yet there is no snapshot")
            found += [*recovers(lab), *(f"on the host: {text}" for text in lab.machine.leftovers())]
            problems += [f"{script}: {text}" for text in found]
    assert problems == []
