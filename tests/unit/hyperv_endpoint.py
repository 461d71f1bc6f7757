"""What tests of the Hyper-V transport share: a dispatcher made of functions by the text that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from vmsnap.hypervisors.hyperv.connection import Authentication, HostConnection, Login
from vmsnap.hypervisors.hyperv.transport import Script
from vmsnap.testing.hyperv.dispatch import Invocation, PowerShellError, Streams
from vmsnap.testing.hyperv.endpoint import PASSWORD, USER, Endpoint

SOON = timedelta(seconds=20)
ECHO, FAIL, GRUMBLE, LINGER = Script(text="echo"), Script(text="fail"), Script(text="grumble"), Script(text="linger")


class Host:
    """Counts what it was asked to do."""

    def __init__(self) -> None:
        self.asked: list[Invocation] = []
        self.stopped: list[str] = []

    def dispatch(self, invocation: Invocation, streams: Streams) -> None:
        self.asked.append(invocation)
        acts: dict[str, Callable[[Invocation, Streams], None]] = {
            "echo": _echo,
            "fail": _fail,
            "grumble": _grumble,
            "linger": self._linger,
        }
        acts.get(invocation.call.text, _echo)(invocation, streams)

    def _linger(self, invocation: Invocation, streams: Streams) -> None:
        streams.progress("lingering", percent=1)
        if streams.stopped.wait(20):
            self.stopped.append(invocation.call.text)


def _echo(invocation: Invocation, streams: Streams) -> None:
    call = invocation.call
    streams.write({"Text": call.text, "User": invocation.user, "Parameters": repr(dict(call.parameters))})


def _fail(invocation: Invocation, streams: Streams) -> None:
    raise PowerShellError(
        "Der Vorgang ist fehlgeschlagen.", error_id="OperationFailed,Microsoft.HyperV.PowerShell.Commands.ExportVM"
    )


def _grumble(invocation: Invocation, streams: Streams) -> None:
    streams.error(
        PowerShellError(
            "Nicht genug Platz (0x80070070).", error_id="OperationFailed,Microsoft.HyperV.PowerShell.Commands.ExportVM"
        )
    )
    streams.write({"Done": True})


def connection(
    endpoint: Endpoint,
    *,
    authentication: Authentication = Authentication.NEGOTIATE,
    password: str = PASSWORD,
    authority: str | None = None,
    host: str = "127.0.0.1",
    configuration: str = "Microsoft.PowerShell",
) -> HostConnection:
    """Return how to reach an endpoint with its account."""
    return HostConnection(
        host=host,
        port=endpoint.port,
        tls=endpoint.settings.tls is not None,
        authentication=authentication,
        login=Login(user=USER, password=password),
        authority=authority,
        configuration=configuration,
        connect_timeout=timedelta(seconds=2),
        operation_timeout=timedelta(seconds=5),
    )
