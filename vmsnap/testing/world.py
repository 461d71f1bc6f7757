"""A whole installation in memory: what lasts (host, network, store, state), and processes that come, work and die."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

from vmsnap.disks.exporting import LocalFolders
from vmsnap.engines.registry import engine_for
from vmsnap.errors import GuestUnreachableError
from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import FileSystemState
from vmsnap.model.history import Starter, Trigger
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.owner import Owner
from vmsnap.ports.replica import Replica
from vmsnap.testing.fake_access import FakeAccess
from vmsnap.testing.fake_disks import FakeDiskExport, FakeDiskInspector
from vmsnap.testing.fake_exports import FakeExports
from vmsnap.testing.fake_guest import FILE_SYSTEM_UUID, FakeGuest
from vmsnap.testing.fake_hints import FakeHints
from vmsnap.testing.fake_host import Ended, FakeHost
from vmsnap.testing.fake_hypervisor import FakeHypervisor
from vmsnap.testing.fake_names import FakeNames, FakeServer
from vmsnap.testing.fake_network import FakeAddressing, FakeFence, NetworkWorld
from vmsnap.testing.fake_postgresql import FakeCluster
from vmsnap.testing.fake_service import FakeResidences, FakeServices
from vmsnap.testing.fake_vitals import FakeVitals
from vmsnap.testing.faults import Faults
from vmsnap.testing.memory_state import MemoryState
from vmsnap.testing.memory_store import MemoryStore
from vmsnap.workflow.world import World

START = datetime(2026, 11, 21, 2, 0, tzinfo=UTC)
STARTER = Starter(trigger=Trigger.OPERATOR, user="tester", detail="vmsnap, in a test")
_LATER_DISKS_UUID = "00000000-0000-4000-8000-0000000000{:02x}"


class FakeClock:
    """The port ``Clock``. Nobody waits: sleeping moves it on, and so does each look, by a millisecond."""

    def __init__(self) -> None:
        self._passed = timedelta(0)

    def now(self) -> datetime:
        """Return the wall clock."""
        self.sleep(timedelta(milliseconds=1))
        return START + self._passed

    def monotonic(self) -> float:
        """Return the monotonic clock."""
        self.sleep(timedelta(milliseconds=1))
        return self._passed.total_seconds()

    def sleep(self, duration: timedelta) -> None:
        """Move the clock on."""
        self._passed += duration


class QuietProgress:
    """The port ``Progress``, remembered."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []

    def step(self, name: str) -> None:
        """Remember a step."""
        self.steps.append(name)

    def bytes_done(self, done: int, total: int) -> None:
        """Do nothing."""

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Remember a note."""
        self.notes.append(text)


class FakeWorld:
    """An installation with one running PostgreSQL guest, ``db``.

    ``process`` gives the drivers of a fresh process, with faults or without. Run one process at a time, and end each
    with ``end``: whatever it still held is then free.
    """

    def __init__(self, folder: Path, *, disks: int = 1) -> None:
        self.network = NetworkWorld(needs_watch=True)
        self.host = FakeHost(network=self.network)
        self.host.offline = self._show_disks
        self.clock = FakeClock()
        self.state = MemoryState()
        self.store = MemoryStore(folder / "store", now=self.clock.now)
        self.export = FakeDiskExport(folder / "export")
        self.exports = FakeExports(lambda: self.replica, between=lambda where: self.host.between(where))  # noqa: PLW0108 - it changes
        self.inspector = FakeDiskInspector()
        self.addressing = FakeAddressing()
        self.services = FakeServices()
        self.residences = FakeResidences(self.network)
        self.dns = FakeServer()
        self.vitals = FakeVitals()
        self.replica: Replica | None = None
        self.clone_door: int | None = None
        self.production_door: int | None = None
        self._run_ids = count(1)
        self.add_guest("db", disks=disks)

    def add_guest(self, name: str, *, disks: int = 1) -> FakeGuest:
        """Put another PostgreSQL guest on the host."""
        guest = FakeGuest(clusters=(FakeCluster(will_finish=2, will_hang=1),))
        self.host.add_guest(name, guest=guest, disks=disks, index=len(self.host.machines) + 1)
        return guest

    def process(self, faults: Faults | None = None) -> World:
        """Return the drivers of a fresh process."""
        world = World(
            hypervisor=FakeHypervisor(self.host, clock=self.clock),
            hints=FakeHints(self.host),
            fence=FakeFence(self.network),
            addressing=self.addressing,
            services=self.services,
            residences=self.residences,
            names=FakeNames(self.dns),
            access=FakeAccess(self.host, clock=self.clock, clone_door=self.clone_door),
            direct=self._connect_directly,
            export=self.export,
            inspector=self.inspector,
            store=self.store,
            replica=self.replica,
            folders=LocalFolders(),
            exports=self.exports,
            journals=self.state.journals,
            locks=self.state.locks,
            admissions=self.state.admissions,
            book=self.state.environments,
            attempts=self.state.attempts,
            samples=self.state.samples,
            exchanges=self.state.exchanges,
            rungs=self.state.rungs,
            vitals=self.vitals,
            history=self.state.history,
            starter=STARTER,
            clock=self.clock,
            engine_for=engine_for,
            new_run_id=lambda: RunId(f"{next(self._run_ids):010x}"),
        )
        if faults is None:
            return world
        self.host.between = faults.point
        return faults.world(world)

    def end(self) -> None:
        """End the present process, if it has not died, and begin another."""
        self.host.between = _nothing
        self.network.end_of_process()
        self.state.die()
        self.state.restart()

    def _connect_directly(self, host: str, port: int, timeout: timedelta) -> socket.socket:
        if self.production_door is None:
            raise GuestUnreachableError(f"{host} port {port} does not answer", remedy="this is a fake")
        return socket.create_connection(("127.0.0.1", self.production_door), timeout.total_seconds())

    @contextmanager
    def ssh_servers(self, *, clone_address: str) -> Iterator[None]:
        """Let guests, and the clone at ``clone_address``, answer by SSH meanwhile."""
        with (
            socket.create_server(("127.0.0.1", 0), backlog=1024) as production,
            socket.create_server(("127.0.0.1", 0), backlog=1024) as clones,
        ):
            self.production_door = production.getsockname()[1]
            self.clone_door = clones.getsockname()[1]
            self.network.servers[clone_address, 22] = ("127.0.0.1", self.clone_door)
            try:
                yield
            finally:
                self.production_door = self.clone_door = None

    def _show_disks(self, images: tuple[DiskImage, ...], ended: Ended) -> None:
        """Let export and inspector show the disks of a clone that is off."""
        for index, image in enumerate(images):
            self.export.contents[image.path] = {0: disk_bytes(self.host.content(image.path))}
            identity = FILE_SYSTEM_UUID if index == 0 else _LATER_DISKS_UUID.format(index)
            observed = "state clean, 0 errors" if ended.in_order else "state clean, needs_recovery, 0 errors"
            self.inspector.states[image.target] = (
                FileSystemState(disk=image.target, kind="ext4", uuid=identity, clean=ended.in_order, observed=observed),
            )
        self.inspector.files = {
            (FILE_SYSTEM_UUID, path): content
            for cluster in ended.guest.clusters
            for path, content in cluster.files().items()
        }

    # What tests ask

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Return the owners of resources, without faults."""
        return (
            FakeHypervisor(self.host, clock=self.clock),
            FakeFence(self.network),
            self.services,
            self.export,
            self.exports,
            self.store,
        )

    def leftovers(self) -> tuple[Resource, ...]:
        """Return what runs left that no environment keeps."""
        kept = {record.run for record in self.state.journals.records() if record.kept_for is not None}
        return tuple(item for owner in self.owners for item in owner.owned() if item.run not in kept)

    def unfinished(self) -> tuple[RunId, ...]:
        """Return runs whose journals are neither finished nor kept."""
        records = self.state.journals.records()
        return tuple(record.run for record in records if not record.closed and record.kept_for is None)

    def stored_writes(self, snapshot: Snapshot, *, target: str = "vda") -> frozenset[str]:
        """Return the writes that a stored disk holds."""
        for image in self.store.images(snapshot):
            if image.target == target:
                return frozenset(json.loads(Path(image.path).read_bytes().rstrip(b"\0")))
        msg = f"{snapshot.id} has no disk {target}"
        raise LookupError(msg)


def disk_bytes(writes: frozenset[str]) -> bytes:
    """Return the bytes of a disk that holds these writes, so that a test can read them back from a stored image."""
    return json.dumps(sorted(writes)).encode()


def _nothing(_: str) -> None:
    """Stand for a hook nobody set."""
