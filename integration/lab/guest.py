"""A guest of the lab: a booted Debian with PostgreSQL, and ways to look into it that are not vmsnap's."""

from __future__ import annotations

import base64
import json
import re
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import libvirt
import libvirt_qemu

from integration.lab.commands import LabError
from integration.lab.disks import GuestDisks
from integration.lab.domain import AttachedDisk, GuestSpec, console_log, domain_xml
from integration.lab.lab import Lab
from integration.lab.services import URI

BOOT_LIMIT_S = 60.0  # under hardware virtualisation; scaled by the lab's factor
# What a new guest gets for its first start. QEMU 7.2's emulation of several processors loses the end of a timer interrupt now
# and then while the guest's kernel starts: the first processor's local APIC keeps vector 236 in service (`info lapic 0`), takes
# no other interrupt, and the guest stands still for good. Seen in 2 of about 360 boots with four processors on a busy host, and
# never with one processor.
FIRST_LIMIT_S = 30.0
# Not /usr/bin's: those are Perl scripts that pick a version, which costs an emulated guest a second a call.
POSTGRESQL_BIN = "/usr/lib/postgresql/15/bin"
PGBENCH_UNIT = "lab-pgbench"
PGBENCH_LOG = "/run/lab-pgbench.log"


@dataclass(frozen=True)
class Result:
    """What a command in the guest came to."""

    exit_status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Progress:
    """One line of `pgbench --progress=1`: seconds since pgbench began, transactions per second in the last second."""

    at_s: float
    tps: float


class LabGuest:
    """A defined guest. As a context manager: started, waited for, and removed with its disks at the end."""

    def __init__(self, lab: Lab, spec: GuestSpec | None = None) -> None:
        self.lab = lab
        self.spec = spec or GuestSpec()
        self._connection: libvirt.virConnect | None = None
        self._disks = GuestDisks(lab, self.spec)
        self.xml = domain_xml(lab, self.spec, self._disks.attached)
        try:
            self.connection.defineXML(self.xml)
        except libvirt.libvirtError as error:
            self._disks.close()
            raise LabError(f"cannot define {self.name!r}: {error}") from error

    def __enter__(self) -> Self:
        try:
            self.boot_new()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()

    # --- the domain ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def disks(self) -> tuple[AttachedDisk, ...]:
        return self._disks.attached

    @property
    def connection(self) -> libvirt.virConnect:
        """A connection to the lab's libvirtd, opened again after libvirtd was restarted."""
        if self._connection is not None:
            try:
                self._connection.getLibVersion()
            except libvirt.libvirtError:
                # That libvirtd has gone is found out by whoever asks it for something next; ``isAlive`` does not ask.
                self._connection = None
        if self._connection is None:
            self._connection = libvirt.open(URI)
        return self._connection

    @property
    def domain(self) -> libvirt.virDomain:
        return self.connection.lookupByUUIDString(self.spec.uuid)

    def start(self) -> None:
        """Start the domain; returns at once."""
        self.domain.create()

    def boot_new(self) -> None:
        """Boot a guest that nobody has touched yet; if it does not come up, once more, and the report tells of it."""
        self.start()
        try:
            self.wait_for_agent(limit_s=FIRST_LIMIT_S)
        except LabError as error:
            warnings.warn(f"started a second time: {error}", RuntimeWarning, stacklevel=2)
            self.domain.destroy()
            self.start()
            self.wait_for_agent()
        self.wait_for_postgresql()

    def boot(self) -> float:
        """Start it and wait until agent and PostgreSQL answer; returns the seconds until the agent did."""
        began = time.monotonic()
        self.start()
        self.wait_for_agent()
        agent_s = time.monotonic() - began
        self.wait_for_postgresql()
        return agent_s

    def remove(self) -> None:
        """Destroy, undefine and delete the guest with all it left on the host. Repeatable."""
        with suppress(libvirt.libvirtError):
            self.domain.destroy()
        flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        with suppress(libvirt.libvirtError):
            self.domain.undefineFlags(flags)
        if self._connection is not None:
            with suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None
        self._disks.close()

    def console(self) -> str:
        """All that the guest has printed on its serial console."""
        path = console_log(self.lab, self.spec)
        return path.read_text(errors="replace") if path.exists() else ""

    # --- inside, through the agent --------------------------------------------------------------------------------------

    def wait_for_agent(self, *, limit_s: float = BOOT_LIMIT_S) -> None:
        """Wait until the guest agent answers. Raises `LabError` with the end of the console.

        ``limit_s`` is for hardware virtualisation, and scaled by the lab's factor.
        """
        self._wait("guest agent", lambda: self.agent("guest-ping"), limit_s=limit_s)

    def wait_for_postgresql(self) -> None:
        """Wait until PostgreSQL takes connections inside the guest."""
        self._wait("PostgreSQL", lambda: self.run([f"{POSTGRESQL_BIN}/pg_isready", "--quiet"]))

    def _wait(self, what: str, attempt: Callable[[], object], *, limit_s: float = BOOT_LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s * self.lab.time_factor
        while True:
            try:
                attempt()
            except (libvirt.libvirtError, LabError) as error:
                if time.monotonic() > deadline:
                    raise LabError(f"{what} of {self.name!r}: {error}; {self._standing()}") from None
                time.sleep(0.5)
            else:
                return

    def _standing(self) -> str:
        """Where a guest stands that does not answer: its state, where each processor is, and the end of its console."""
        try:
            state, reason = self.domain.state()
            registers = libvirt_qemu.qemuMonitorCommand(
                self.domain, "info registers -a", libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
            )
        except libvirt.libvirtError as error:
            found = str(error)
        else:
            # One each: the next instruction, and whether the processor waits for an interrupt.
            processors = re.findall(r"\b[RE]IP=\w+ .*?\bHLT=\d", registers)
            found = f"state {state} for reason {reason}, {processors}"
        return f"{found}; console:\n{self.console()[-3000:]}"

    def agent(self, command: str, **arguments: object) -> object:
        """One command of the QEMU guest agent; returns its 'return' value. Raises libvirtError."""
        request = json.dumps({"execute": command, "arguments": arguments})
        timeout_s = int(10 * self.lab.time_factor)
        answer: object = json.loads(libvirt_qemu.qemuAgentCommand(self.domain, request, timeout_s, 0))["return"]
        return answer

    def exec(self, command: Sequence[str], *, text: str = "", timeout_s: float = 30.0) -> Result:
        """Run a command in the guest as root (no shell), whatever its exit status."""
        request: dict[str, object] = {"path": command[0], "arg": list(command[1:]), "capture-output": True}
        if text:
            request["input-data"] = base64.b64encode(text.encode()).decode()
        started = self.agent("guest-exec", **request)
        assert isinstance(started, dict)
        deadline = time.monotonic() + timeout_s * self.lab.time_factor
        delay_s = 0.05
        while True:
            status = self.agent("guest-exec-status", pid=started["pid"])
            assert isinstance(status, dict)
            if status["exited"]:
                out, err = (
                    base64.b64decode(status.get(key, "")).decode(errors="replace") for key in ("out-data", "err-data")
                )
                return Result(exit_status=status.get("exitcode", 128 + status.get("signal", 0)), stdout=out, stderr=err)
            if time.monotonic() > deadline:
                raise LabError(f"{list(command)} still runs in {self.name!r}")
            time.sleep(delay_s)
            delay_s = min(delay_s * 2, 0.5)

    def run(self, command: Sequence[str], *, text: str = "", timeout_s: float = 30.0) -> str:
        """Like `exec`; returns stdout, raises `LabError` unless the exit status is zero."""
        result = self.exec(command, text=text, timeout_s=timeout_s)
        if result.exit_status != 0:
            raise LabError(
                f"{list(command)} in {self.name!r}: exit status {result.exit_status}: {result.stderr.strip()}"
            )
        return result.stdout

    def psql(self, sql: str, *, database: str = "app", port: int = 5432, timeout_s: float = 30.0) -> str:
        """Run SQL as the database's superuser; returns rows as lines, columns parted by '|'."""
        options = ["--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", f"--port={port}"]
        command = [f"{POSTGRESQL_BIN}/psql", "--username=postgres", *options, f"--dbname={database}", "--file=-"]
        return self.run(command, text=sql, timeout_s=timeout_s).strip()

    # --- from outside -------------------------------------------------------------------------------------------------

    def address(self) -> str:
        """The guest's address on the production network: the static one, or what dnsmasq leased to its first NIC."""
        if self.spec.static_address is not None:
            return self.spec.static_address.split("/")[0]
        deadline = time.monotonic() + 10 * self.lab.time_factor
        while time.monotonic() < deadline:
            for line in self.lab.leases.read_text().splitlines() if self.lab.leases.exists() else ():
                _expiry, mac, address, *_ = line.split()
                if mac == self.spec.macs[0]:
                    return address
            time.sleep(0.2)
        raise LabError(f"dnsmasq has leased nothing to {self.spec.macs[0]}; see {self.lab.log / 'dnsmasq.log'}")

    def ssh_banner(self) -> str:
        """What the SSH server says first, read over the production network."""
        with socket.create_connection((self.address(), 22), timeout=10 * self.lab.time_factor) as connection:
            return connection.recv(256).decode(errors="replace").strip()

    # --- load -----------------------------------------------------------------------------------------------------------

    def start_pgbench(self, *, clients: int = 4) -> None:
        """Start pgbench inside the guest as a service of its own, until stopped."""
        properties = [f"--property=StandardError=truncate:{PGBENCH_LOG}", "--property=User=postgres"]
        load = [
            f"{POSTGRESQL_BIN}/pgbench",
            f"--client={clients}",
            "--jobs=1",
            "--time=86400",
            "--progress=1",
            "--no-vacuum",
            "bench",
        ]
        self.run(["systemd-run", f"--unit={PGBENCH_UNIT}", "--collect", *properties, *load])

    def pgbench_progress(self) -> list[Progress]:
        """The seconds that pgbench has reported so far, oldest first."""
        lines = self.exec(["cat", PGBENCH_LOG]).stdout
        found = re.findall(r"^progress: ([0-9.]+) s, ([0-9.]+) tps", lines, flags=re.MULTILINE)
        return [Progress(at_s=float(at), tps=float(tps)) for at, tps in found]

    def stop_pgbench(self) -> list[Progress]:
        """Stop it; returns all of its progress. Repeatable."""
        self.exec(["systemctl", "stop", f"{PGBENCH_UNIT}.service"])
        return self.pgbench_progress()
