"""Disks for guests of a simulated Hyper-V host: real file systems with real PostgreSQL data directories, in VHDX and VHD.

The contents are made once and kept beside the lab's images, under a hash of this module: ``running.raw`` is the disk of a
server in production, as it is while it works; ``clean.raw`` the same disk after the server, and the guest, have been shut down.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from integration.lab.image import cache_folder
from vmsnap.disks.export import QemuExport
from vmsnap.disks.filesystems import OfflineInspector
from vmsnap.engines.pg_control import ClusterState
from vmsnap.ports.owner import Owner
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.fake_guest import FILE_SYSTEM_UUID, FakeGuest
from vmsnap.testing.fake_postgresql import FakeCluster
from vmsnap.testing.faults import Faults
from vmsnap.testing.hyperv.values import Controller, HardDiskDrive, VirtualMachine, VMNetworkAdapter, VMState
from vmsnap.testing.hyperv.world import DatabaseGuest, HyperVWorld
from vmsnap.workflow.world import World

MIB = 1 << 20
DISK_BYTES = 96 * MIB
DATA_DIRECTORY = "var/lib/postgresql/15/main"
PROGRAMS = Path("/usr/lib/postgresql/15/bin")
ROWS = 1000
_SECOND_UUID = "5f0c7a5e-2f43-4e5c-9d0c-0d6a4b1c9f12"


def run(*argv: str | Path, timeout_seconds: float = 120) -> str:
    """Run a program that must succeed; return what it says."""
    done = subprocess.run(
        [str(word) for word in argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        cwd="/",
        env={**os.environ, "LC_ALL": "C", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def as_postgres(*argv: str | Path) -> str:
    """Run a program as the database's user."""
    return run("runuser", "-u", "postgres", "--", *argv)


def contents() -> Path:
    """Return the folder with ``running.raw``, ``clean.raw`` and ``second.raw``, made first where it is not kept."""
    cache = cache_folder()
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cache / f"hyperv-{digest}"
    with (cache / "hyperv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            work = cache / "hyperv-building"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _make(work)
            for old in cache.glob("hyperv-????????????????"):
                shutil.rmtree(old)
            work.rename(folder)
    return folder


def _make(folder: Path) -> None:
    with database_folder() as place:
        tree = place / "tree"
        data = tree / DATA_DIRECTORY
        data.parent.mkdir(parents=True)
        shutil.chown(data.parent, "postgres")
        as_postgres(PROGRAMS / "initdb", "-D", data, "-A", "trust", "--no-sync", "--wal-segsize=1")
        start(data)
        sql(data, f"CREATE TABLE kept AS SELECT generate_series(1, {ROWS}) AS number; CHECKPOINT;")
        sql(data, f"INSERT INTO kept SELECT generate_series({ROWS + 1}, {2 * ROWS});")
        shutil.copytree(tree, place / "running", ignore=shutil.ignore_patterns(".s.*"), copy_function=_copy)
        stop(data)
        for name, source in (("running", place / "running"), ("clean", tree)):
            image = folder / f"{name}.raw"
            run("mkfs.ext4", "-q", "-F", "-U", FILE_SYSTEM_UUID, "-d", source, image, f"{DISK_BYTES // MIB}M")
    run("debugfs", "-w", "-R", "feature needs_recovery", folder / "running.raw")
    run("mkfs.ext4", "-q", "-F", "-U", _SECOND_UUID, folder / "second.raw", f"{DISK_BYTES // MIB}M")


@contextmanager
def database_folder() -> Iterator[Path]:
    """A folder that the database's user can reach."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-hyperv-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        yield place


def _copy(source: str, target: str) -> str:
    try:
        return str(shutil.copy2(source, target))
    except FileNotFoundError:
        return target  # the server has removed it meanwhile


def start(data: Path) -> None:
    """Start a server on a data directory, reached by a socket in it alone."""
    options = f"-c listen_addresses= -k {data}"
    as_postgres(PROGRAMS / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start")


def stop(data: Path) -> None:
    """Stop a server in order."""
    as_postgres(PROGRAMS / "pg_ctl", "-D", data, "-w", "-m", "fast", "stop")


def sql(data: Path, text: str) -> str:
    """Return what a server answers."""
    return as_postgres(PROGRAMS / "psql", "-h", data, "-At", "-c", text, "postgres").strip()


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of virtual disks, and the generation of the VM that has it."""

    qemu: str
    options: str
    suffix: str
    generation: int

    def convert(self, raw: Path, target: Path) -> Path:
        """Write a raw disk in this format."""
        run("qemu-img", "convert", "-f", "raw", "-O", self.qemu, "-o", self.options, raw, target)
        return target


FORMATS = {
    "dynamic VHDX": Format(qemu="vhdx", options="subformat=dynamic,block_size=1M", suffix="vhdx", generation=2),
    "fixed VHDX": Format(qemu="vhdx", options="subformat=fixed", suffix="vhdx", generation=2),
    "dynamic VHD": Format(qemu="vpc", options="subformat=dynamic,force_size", suffix="vhd", generation=1),
    "fixed VHD": Format(qemu="vpc", options="subformat=fixed,force_size", suffix="vhd", generation=1),
}


class DiskGuest(DatabaseGuest):
    """A guest whose disks are real: once its server was stopped and it shut down in order, they are the clean ones."""

    def __init__(self, guest: FakeGuest, *, clean: Sequence[Path | None]) -> None:
        super().__init__(guest, disks=0)
        self.clean = tuple(clean)

    def with_guest(self, guest: FakeGuest) -> DiskGuest:
        """Return the same disks with another guest on them."""
        other = DiskGuest(guest, clean=self.clean)
        other.obeys, other.ends_in_order, other.heartbeat = self.obeys, self.ends_in_order, self.heartbeat
        return other

    def ended(self, *, in_order: bool) -> tuple[Path | None, ...]:
        """Return what is on the disks then."""
        super().ended(in_order=in_order)
        stopped = all(cluster.state is ClusterState.SHUT_DOWN for cluster in self.guest.clusters)
        return self.clean if in_order and stopped else tuple(None for _ in self.clean)


class DiskWorld(HyperVWorld):
    """An installation whose disks, export, inspector and store are real."""

    def __init__(self, folder: Path, *, disk_format: Format) -> None:
        self._format = disk_format
        self._folder = folder
        for name in ("templates", "images"):
            (folder / name).mkdir(parents=True)
        super().__init__(folder, disks=2)
        self.real_store = ImagesStore(folder / "images", allow_copies=True, now=self.clock.now)
        self.real_export = QemuExport(runtime_dir=folder / "runtime")

    def add_vm(self, name: str, *, disks: int = 1) -> VirtualMachine:
        """Put a running VM on the host: its server's disk, and a second one."""
        made, kind = contents(), self._format
        first = Controller.IDE if kind.generation == 1 else Controller.SCSI
        self.machine.files.make_folder("C:\\VMs")
        drives = [
            HardDiskDrive(path=f"C:\\VMs\\{part}.{kind.suffix}", controller_type=first, controller_location=index)
            for index, part in enumerate(("system", "data")[:disks])
        ]
        for drive, raw in zip(drives, ("running.raw", "second.raw"), strict=True):
            kind.convert(made / raw, self.machine.files.local(drive.path))
        clean = kind.convert(made / "clean.raw", self._folder / "templates" / f"clean.{kind.suffix}")
        vm = VirtualMachine(
            name=name,
            state=VMState.RUNNING,
            generation=kind.generation,
            hard_drives=drives,
            network_adapters=[VMNetworkAdapter(mac_address="00155D000001", switch_name="LAN")],
        )
        guest = FakeGuest(clusters=(FakeCluster(data_directory=f"/{DATA_DIRECTORY}"),))
        vm.truth.inside = DiskGuest(guest, clean=(clean, None))
        return self.machine.add_vm(vm)

    def process(self, faults: Faults | None = None) -> World:
        """Return the drivers of a fresh process."""
        world = super().process(None)
        world = replace(world, store=self.real_store, export=self.real_export, inspector=OfflineInspector())
        return world if faults is None else faults.world(world)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Return the owners of resources."""
        return (*super().owners[:3], self.real_export, self.real_store)
