"""Ways into the VMs of a ``FakeHost``: the agent's channel, and an access whose SSH needs no server."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from typing import Any

from vmsnap.errors import DeadlineError, GuestCommandError, GuestUnreachableError, PreconditionError
from vmsnap.guests.agent import AgentControl
from vmsnap.guests.agentfile import read_file
from vmsnap.model.command import Command, CommandResult
from vmsnap.model.guest import GuestState, SshLogin
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel, Connector, GuestControl
from vmsnap.testing.fake_host import FakeHost, Machine
from vmsnap.workflow.whereabouts import ADDRESS_QUESTION

_CONNECT = timedelta(seconds=5)


class FakeAgentChannel:
    """The agent's line to one VM of the host, by QEMU's agent protocol."""

    def __init__(self, host: FakeHost, *, domain: str) -> None:
        self._host = host
        self._domain = domain
        self._ended: dict[int, CommandResult | None] = {}
        self._open: dict[int, bytes] = {}

    def send(self, request: str, *, timeout: timedelta) -> str:
        """Answer one request. Raises GuestUnreachableError where the VM does not run or its agent is silent."""
        self._host.live_on()
        machine = self._host.machines.get(self._domain)
        if machine is None or machine.state is not GuestState.RUNNING or not machine.has_agent_channel:
            raise GuestUnreachableError(f"no agent answers in {self._domain!r}", details=f"waited {timeout}")
        machine.guest.ping(timeout=timeout)
        asked = json.loads(request)
        if asked["execute"] == "guest-ping":
            return json.dumps({"return": {}})
        if asked["execute"] == "guest-fsfreeze-thaw":
            return self._thaw(machine)
        if machine.guest.frozen:
            # qga/commands-posix.c, ga_set_frozen: nothing else is allowed meanwhile.
            raise GuestCommandError(f"the guest agent refused {asked['execute']}: the agent is in frozen state")
        if asked["execute"].startswith("guest-file-"):
            return json.dumps({"return": self._file(machine, asked["execute"], asked["arguments"])})
        if machine.run is None and not self._only_looks(asked):
            self._host.violations.append(f"{asked['execute']} in {self._domain!r}, which is production")
        if asked["execute"] == "guest-exec":
            return json.dumps({"return": {"pid": self._start(machine, asked["arguments"])}})
        return json.dumps({"return": self._status(asked["arguments"]["pid"])})

    def _thaw(self, machine: Machine) -> str:
        if machine.run is None:
            self._host.violations.append(f"{machine.name!r} was thawed, which is production")
        thawed, machine.guest.frozen = int(machine.guest.frozen), False
        return json.dumps({"return": thawed})

    def _only_looks(self, asked: dict[str, Any]) -> bool:
        """Tell whether a request is the one question that production may be asked, or asks how that went."""
        words = asked["arguments"]
        return asked["execute"] == "guest-exec-status" or (words["path"], *words["arg"]) == ADDRESS_QUESTION.argv

    def _file(self, machine: Machine, request: str, arguments: dict[str, Any]) -> object:
        """Read a file, which is allowed in production too: it changes nothing and runs nothing."""
        if request == "guest-file-open":
            content = machine.guest.file(arguments["path"])
            if arguments["mode"] != "r":
                self._host.violations.append(f"{arguments['path']} opened to be written in {machine.name!r}")
            if content is None:
                raise GuestCommandError(f"failed to open file '{arguments['path']}': No such file or directory")
            handle = 1000 + len(self._open)
            self._open[handle] = content
            return handle
        if request == "guest-file-read":
            content = self._open[arguments["handle"]][: arguments["count"]]
            return {"count": len(content), "buf-b64": base64.b64encode(content).decode("ascii"), "eof": True}
        del self._open[arguments["handle"]]
        return {}

    def _start(self, machine: Machine, arguments: dict[str, object]) -> int:
        argv = (str(arguments["path"]), *(str(word) for word in _words(arguments["arg"])))
        user = None
        if argv[:2] == ("runuser", "-u"):
            user, argv = argv[2], argv[4:]
        stdin = base64.b64decode(str(arguments.get("input-data", "")))
        command = Command(argv=argv, user=user, stdin=stdin, timeout=timedelta(hours=1))
        self._host.before_command(machine.name, command)
        machine.guest.ping(timeout=timedelta(seconds=1))
        pid = 1000 + len(self._ended)
        try:
            self._ended[pid] = machine.guest.run(command, timeout=timedelta(hours=1))
        except DeadlineError:
            self._ended[pid] = None
        return pid

    def _status(self, pid: int) -> dict[str, object]:
        result = self._ended[pid]
        if result is None:
            return {"exited": False}
        return {
            "exited": True,
            "exitcode": result.exit_status,
            "out-data": base64.b64encode(result.stdout).decode("ascii"),
            "err-data": base64.b64encode(result.stderr).decode("ascii"),
        }


def _words(value: object) -> list[object]:
    return value if isinstance(value, list) else []


class FakeSshControl:
    """A control over SSH to whatever VM the connector leads to."""

    def __init__(self, login: SshLogin, *, address: str, connector: Connector, access: FakeAccess) -> None:
        self._login = login
        self._address = address
        self._connector = connector
        self._access = access

    @property
    def method(self) -> str:
        """Return ``ssh``."""
        return "ssh"

    def ping(self, *, timeout: timedelta) -> None:
        """Return where the VM answers with the host key that was pinned."""
        self._machine().guest.ping(timeout=timeout)

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        """Run a command."""
        machine = self._machine()
        if machine.run is None:
            self._access.host.violations.append(f"{command.argv[0]} by SSH in {machine.name!r}, which is production")
        self._access.host.before_command(machine.name, command)
        machine = self._machine()
        result = machine.guest.run(command, timeout=timeout)
        self._access.host.network.heard(machine.run, size_bytes=len(result.stdout))
        return result

    def close(self) -> None:
        """Do nothing."""

    def _machine(self) -> Machine:
        self._access.host.live_on()
        machine = self._access.reach(self._address, port=self._login.port, connector=self._connector)
        if self._login.host_key != machine.host_key:
            raise PreconditionError(f"{self._address} is another server than the guest: its host key differs")
        return machine


class FakeAccess:
    """``ports.guest.GuestAccess`` over a host.

    A connector leads to a listener on loopback: through the one on port ``clone_door`` to the clone that runs, through
    any other to production.
    """

    def __init__(
        self, host: FakeHost, *, clock: Clock, clone_door: int | None = None, cancel: Cancel | None = None
    ) -> None:
        self.host = host
        self._cancel = cancel
        self.clone_door = clone_door
        self._clock = clock

    def cancelled_by(self, cancel: Cancel) -> FakeAccess:
        """Return the same access with another cancel."""
        return FakeAccess(self.host, clock=self._clock, clone_door=self.clone_door, cancel=cancel)

    def agent(self, channel: AgentChannel, *, urgent: bool = False) -> GuestControl:
        """Return a control over the guest agent, the real one."""
        return AgentControl(channel, clock=self._clock, cancel=self._cancel, urgent=urgent)

    def read_file(self, channel: AgentChannel, *, path: str, timeout: timedelta) -> bytes | None:
        """Return a guest's file as its agent reads it, by the real code."""
        return read_file(channel, path=path, timeout=timeout)

    def ssh(self, login: SshLogin, *, address: str, connector: Connector) -> GuestControl:
        """Return a control over SSH."""
        return FakeSshControl(login, address=address, connector=connector, access=self)

    def host_key(self, login: SshLogin, *, address: str, connector: Connector) -> str:
        """Return the host key of the VM at an address."""
        return self.reach(address, port=login.port, connector=connector).host_key

    def reach(self, address: str, *, port: int, connector: Connector) -> Machine:
        """Return the VM that a connector leads to."""
        with connector(address, port, _CONNECT) as line:
            door = line.getpeername()[1]
        machines = self.host.made() if door == self.clone_door else self.host.sources()
        for machine in machines:
            at_home = any(str(interface.ip) == address for interface in machine.addresses)
            if machine.state is GuestState.RUNNING and (machine.transient or at_home):
                return machine
        raise GuestUnreachableError(f"nobody answers at {address}", remedy="this is a fake")
