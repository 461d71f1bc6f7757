"""A Windows guest with PostgreSQL behind PowerShell Direct, played from its scripts, on a real NTFS volume.

No PowerShell runs: each of vmsnap's constant scripts is known by its text, and answered as Windows would.
"""

from __future__ import annotations

import base64
import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from integration import ntfs_volumes
from integration.hyperv_disks import DATA_DIRECTORY, DISK_BYTES, FORMATS, DiskWorld, contents, run
from vmsnap.disks.ntfs import read_file
from vmsnap.engines.drain_outcome import OPENED, RESULT
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.windows import names_in
from vmsnap.guests.access import Access
from vmsnap.hypervisors.hyperv.connection import Login, Parameter, Row
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.tags import RunFolders
from vmsnap.model.command import Command
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Cancel
from vmsnap.state.clock import SystemClock
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.faults import Faults
from vmsnap.testing.hyperv.direct import split_command_line
from vmsnap.testing.hyperv.running import TwinRunner
from vmsnap.testing.hyperv.values import HardDiskDrive, VirtualMachine, VMNetworkAdapter, VMState
from vmsnap.testing.hyperv.world import EXPORTS
from vmsnap.workflow.signs import signs_of
from vmsnap.workflow.world import World

LOGIN = Login(user="Administrator", password="Gr8-Secret")
INSIDE = "PostgreSQL/15/data"
DATA = "C:\\" + INSIDE.replace("/", "\\")
PROGRAMS = "C:\\PostgreSQL\\15\\bin"
_PID = 4711
_SIGNS = signs_of("powershell", run=RunId("0" * 10), token="")
Answer = dict[str, object]


def make_volumes(folder: Path) -> tuple[Path, Path]:
    """Make the volume of a server in production, the journal in use, and the same one after both were shut down."""
    working, clean = folder / "windows-running.raw", folder / "windows-clean.raw"
    ntfs_volumes.make(working, size_bytes=DISK_BYTES)
    for image, source in ((working, "running"), (clean, "clean")):
        if image is clean:
            shutil.copyfile(working, clean)
        with tempfile.TemporaryDirectory() as scratch, ntfs_volumes.mounted(image, at=Path(scratch, "mnt")) as root:
            run("debugfs", "-R", f'rdump "/{DATA_DIRECTORY}" "{scratch}"', contents() / f"{source}.raw")
            shutil.rmtree(root / "PostgreSQL", ignore_errors=True)
            shutil.copytree(Path(scratch, "main"), root / INSIDE, copy_function=shutil.copyfile)
    place = ntfs_volumes.log_place(working)
    for image, page in (
        (working, ntfs_volumes.restart_page(in_use=0)),
        (clean, ntfs_volumes.restart_page(in_use=0, flags=2)),
    ):
        ntfs_volumes.patch(image, place, page + page)
    return working, clean


class WindowsGuest:
    """What runs in a VM (``vmsnap.testing.hyperv.values.Inside``). ``stopped``: its server was, in order.

    ``clean``: what its disk holds then; None: what it held before.
    """

    shutdown_takes = 2
    obeys = True
    ends_in_order = True
    heartbeat = True

    def __init__(self, *, volume: Path, clean: Path) -> None:
        self._volume = volume
        self.clean: Path | None = clean
        self.tokens: dict[str, str] = {}
        self.stopped = False
        self.asked: list[str] = []

    def captured(self) -> WindowsGuest:
        """Return the same guest at this instant."""
        twin = copy.copy(self)
        twin.tokens, twin.asked = dict(self.tokens), []
        return twin

    def booted(self) -> WindowsGuest:
        """Return the guest as it comes up."""
        return self.captured()

    def ended(self, *, in_order: bool) -> tuple[Path | None, ...]:
        """Return what is on the disk then."""
        return (self.clean if in_order and self.stopped else None,)

    def run(self, argv: tuple[str, ...], stdin: bytes) -> tuple[int, bytes]:
        """Run a program; return its status and output."""
        if argv[0] == "hostname":
            return 0, b"WINDB\r\n"
        if argv[0].endswith("pg_ctl.exe"):
            assert argv[1:6] == ("stop", "-D", DATA, "-m", "fast")
            self.stopped = True
            return 0, b"server stopped\r\n"
        if argv in {_SIGNS.write.argv, _SIGNS.read.argv, _SIGNS.boot.argv}:
            return self._sign(argv, stdin.decode("ascii"))
        (name,) = names_in(Command(argv=argv))
        self.asked.append(name)
        given = json.loads(stdin)
        return 0, self._psql() if name == "postgresql_psql" else json.dumps(self._answer(name, given)).encode()

    def _sign(self, argv: tuple[str, ...], text: str) -> tuple[int, bytes]:
        if argv == _SIGNS.boot.argv:
            return 0, b"2026-11-20T06:00:00.0000000Z"
        if argv == _SIGNS.read.argv:
            return 0, self.tokens.get(text, "").encode()
        identity, token = text.split(" ")
        self.tokens[identity] = token
        return 0, b""

    def _psql(self) -> bytes:
        result = {"in_flight": 3, "finished": 2, "rolled_back": 1, "prepared": 0, "seconds": 0.5}
        return f"{OPENED}\r\n2\r\n1\r\n{RESULT}{json.dumps(result)}\r\n".encode()

    def _answer(self, name: str, given: Mapping[str, object]) -> Answer | list[Answer]:
        state = ClusterState.SHUT_DOWN if self.stopped else ClusterState.IN_PRODUCTION
        lock = f"{_PID}\n{DATA}\n1795249458\n5432\n\n127.0.0.1\n  2229011        24\nready   \n"
        if name == "postgresql_discover":
            command = f'"{PROGRAMS}\\pg_ctl.exe" runservice -N "postgresql-x64-15" -D "{DATA}" -w'
            runs = "Stopped" if self.stopped else "Running"
            service = {"Service": "postgresql-x64-15", "State": runs, "Starts": "Auto", "CommandLine": command}
            return {"Services": [service], "Servers": [] if self.stopped else [{"Pid": _PID, "Parent": 1}]}
        if name == "postgresql_look":
            said = f"Database cluster state:               {state.text}\nDatabase system identifier:           73\n"
            return {"Lock": "" if self.stopped else lock, "Version": "15\n", "Control": said, "Status": 0, "Linked": []}
        assert name == "windows_locate"
        serial = run("blkid", "-p", "-o", "value", "-s", "UUID", self._volume).strip()
        folders = given["Folders"]
        assert isinstance(folders, list)
        return [
            {
                "Folder": folder,
                "Volume": "\\\\?\\Volume{7a1c9a2e-0000-0000-0000-100000000000}\\",
                "Inside": str(folder).removeprefix("C:\\"),
                "Facts": f"NTFS Volume Serial Number :       0x{serial.lower()}\r\nVersion : 3.1\r\n",
            }
            for folder in folders
        ]


class _Runner(TwinRunner):
    """Runs scripts on the host, and programs in the guests of its VMs."""

    def run(
        self,
        name: str,
        *,
        doing: str,
        parameters: Mapping[str, Parameter] | None = None,
        timeout: timedelta = timedelta(minutes=2),
        cancel: Cancel | None = None,
    ) -> tuple[Row, ...]:
        """Run a script."""
        if name != "run_in_guest":
            return super().run(name, doing=doing, parameters=parameters, timeout=timeout, cancel=cancel)
        given = dict(parameters or {})
        assert given["Credential"] == LOGIN
        (vm,) = self.host.get_vm(id=str(given["Id"]))
        guest = vm.truth.inside
        assert isinstance(guest, WindowsGuest)
        assert vm.state is VMState.RUNNING
        argv = (str(given["Program"]), *split_command_line(str(given["Arguments"])))
        if vm.truth.origin is None and argv[0] != "hostname":
            self.host.violations.append(f"{argv[0]} was run in {vm.name}, which is production")
        code, output = guest.run(argv, base64.b64decode(str(given["InputBase64"])))
        said = base64.b64encode(output).decode("ascii")
        return ({"Outcome": "ended", "Code": code, "Words": "", "Output": said, "Error": "", "Truncated": False},)


class _Logins:
    def login(self, guest: str) -> Login | None:
        """Return the one account."""
        return LOGIN if guest == "db" else None


class WindowsWorld(DiskWorld):
    """An installation whose guest is a Windows; all of it but the host and the guest themselves is vmsnap's own."""

    def __init__(self, folder: Path, *, volumes: tuple[Path, Path]) -> None:
        self._working, self.clean_volume = volumes
        super().__init__(folder, disk_format=FORMATS["dynamic VHDX"])

    def add_guest(self, name: str, *, disks: int = 1) -> FakeGuest:
        """Put a running VM on the host. Its guest is none of the fakes'."""
        self.add_vm(name, disks=disks)
        return FakeGuest()

    def add_vm(self, name: str, *, disks: int = 1) -> VirtualMachine:
        """Put a running VM on the host."""
        del disks
        working, clean = self._working, self.clean_volume
        kind = self._format
        self.machine.files.make_folder("C:\\VMs")
        drive = HardDiskDrive(path="C:\\VMs\\system.vhdx")
        kind.convert(working, self.machine.files.local(drive.path))
        template = kind.convert(clean, self._folder / "templates" / "clean.vhdx")
        vm = VirtualMachine(
            name=name,
            state=VMState.RUNNING,
            hard_drives=[drive],
            network_adapters=[VMNetworkAdapter(mac_address="00155D000001", switch_name="LAN")],
        )
        vm.truth.inside = WindowsGuest(volume=working, clean=template)
        return self.machine.add_vm(vm)

    def process(self, faults: Faults | None = None) -> World:
        """Return the drivers of a fresh process."""
        world = super().process(None)
        world = replace(
            world,
            hypervisor=HyperVHypervisor(self.connect(), clock=self.clock, logins=_Logins()),
            access=Access(clock=SystemClock()),
        )
        return world if faults is None else faults.world(world)

    def connect(self) -> Host:
        """Return the Hyper-V host as a driver reaches it."""
        folders = RunFolders(root=EXPORTS, mounted=str(self.machine.files.local(EXPORTS)))
        return Host(_Runner(self.machine), folders=folders)


def control_file(image: Path) -> bytes | None:
    """Return the server's control file on a volume."""
    return read_file(image, offset=0, path=f"/{INSIDE}/global/pg_control")
