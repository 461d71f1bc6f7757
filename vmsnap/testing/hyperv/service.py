"""The WinRM service without HTTP: requests of WS-Management in, answers out."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from xml.sax.saxutils import escape

from vmsnap.testing.hyperv import soap
from vmsnap.testing.hyperv.dispatch import Dispatcher
from vmsnap.testing.hyperv.shells import Shell
from vmsnap.testing.hyperv.soap import POWERSHELL, SHELL, Request, WsmanFaultError

# What a German Windows says: nobody may decide by text.
_NO_SHELL = "Die Anforderung enthält ungültige Selektoren für die Ressource."
_TIMED_OUT = "Der Vorgang wurde nicht innerhalb der in OperationTimeout angegebenen Zeit abgeschlossen."
_DENIED = "Zugriff verweigert"
_TOO_MANY_SHELLS = "Die maximale Anzahl gleichzeitiger Shells für diesen Benutzer wurde überschritten."
_NO_CONFIGURATION = "Die Sitzungskonfiguration wurde nicht gefunden."
_FAILED = 500


@dataclass(frozen=True, kw_only=True)
class User:
    """An account. One that may not log in to a session configuration is known, and refused."""

    password: str
    may_connect: bool = True


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """Limits of the service. Idle shells are dropped as ``IdleTimeoutms`` says."""

    max_shells: int = 30
    max_commands: int = 1000
    shell_idle_seconds: float = 7200.0


def _refuse(request: Request, user: str) -> str:  # noqa: ARG001 - one of the actions
    raise WsmanFaultError(soap.RESOURCE_NOT_FOUND, request.action)


class Service:
    """Shells by id. ``configurations`` are the session configurations there are."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        users: dict[str, User],
        quotas: Quotas,
        configurations: frozenset[str],
    ) -> None:
        self.users = users
        self.quotas = quotas
        self.configurations = configurations
        self._dispatcher = dispatcher
        self._lock = threading.Lock()
        self._shells: dict[str, Shell] = {}

    @property
    def open_shells(self) -> int:
        """Return how many shells there are: clients that forget to close leave theirs."""
        with self._lock:
            return len(self._shells)

    def drop_shells(self) -> None:
        """Forget all shells, as a restart of the service does."""
        with self._lock:
            for shell in self._shells.values():
                shell.close()
            self._shells.clear()

    def text_of(self, request: Request) -> str:
        """Return the text of the pipeline that a request belongs to, as far as it has arrived."""
        if request.operation == "Command":
            return base64.b64decode(request.body.findtext(f".//{{{SHELL}}}Arguments") or "").decode("utf-8", "replace")
        with self._lock:
            shell = self._shells.get(request.selectors.get("ShellId", "").upper())
        return "" if shell is None else shell.text_of(request.command_id)

    def handle(self, request: Request, *, user: str) -> tuple[int, bytes]:
        """Act upon a request; return the HTTP status and the envelope to answer with."""
        actions: dict[str, Callable[[Request, str], str]] = {
            "Create": self._create,
            "Command": self._command,
            "Send": self._send,
            "Receive": self._receive,
            "Signal": self._signal,
            "Delete": self._delete,
            "Get": self._get,
        }
        try:
            action = actions.get(request.operation, _refuse)
            return 200, soap.answer(request, body=action(request, user))
        except WsmanFaultError as error:
            return _FAILED, soap.fault(request, error=error)

    def _create(self, request: Request, user: str) -> str:
        if not self.users[user].may_connect:
            raise WsmanFaultError(soap.ACCESS_DENIED, _DENIED)
        configuration = request.resource.rpartition("/")[2]
        if configuration not in self.configurations:
            raise WsmanFaultError(soap.RESOURCE_NOT_FOUND, _NO_CONFIGURATION)
        element = request.element(f"{{{SHELL}}}Shell")
        shell_id = element.attrib["ShellId"].upper()
        shell = Shell(
            shell_id,
            dispatcher=self._dispatcher,
            user=user,
            configuration=configuration,
            max_commands=self.quotas.max_commands,
        )
        with self._lock:
            self._drop_idle()
            if len(self._shells) >= self.quotas.max_shells:
                raise WsmanFaultError(soap.MAX_SHELLS, _TOO_MANY_SHELLS)
            self._shells[shell_id] = shell
        shell.feed(base64.b64decode(element.findtext(f"{{{POWERSHELL}}}creationXml") or ""))
        uri = escape(request.resource)
        return (
            "<x:ResourceCreated><a:Address>http://127.0.0.1/wsman</a:Address><a:ReferenceParameters>"
            f'<w:ResourceURI>{uri}</w:ResourceURI><w:SelectorSet><w:Selector Name="ShellId">{shell_id}</w:Selector>'
            f"</w:SelectorSet></a:ReferenceParameters></x:ResourceCreated>{self._shell_element(shell, uri=uri)}"
        )

    def _shell_element(self, shell: Shell, *, uri: str) -> str:
        idle = self.quotas.shell_idle_seconds
        return (
            f"<rsp:Shell><rsp:ShellId>{shell.id}</rsp:ShellId><rsp:ResourceUri>{uri}</rsp:ResourceUri>"
            f"<rsp:Owner>HV1\\{escape(shell.user)}</rsp:Owner><rsp:ClientIP>127.0.0.1</rsp:ClientIP>"
            f"<rsp:ProcessId>1568</rsp:ProcessId><rsp:IdleTimeOut>PT{idle:.3f}S</rsp:IdleTimeOut>"
            "<rsp:InputStreams>stdin pr</rsp:InputStreams><rsp:OutputStreams>stdout</rsp:OutputStreams>"
            "<rsp:MaxIdleTimeOut>PT2147483.647S</rsp:MaxIdleTimeOut><rsp:Locale>en-US</rsp:Locale>"
            "<rsp:DataLocale>en-US</rsp:DataLocale><rsp:CompressionMode>NoCompression</rsp:CompressionMode>"
            "<rsp:ProfileLoaded>Yes</rsp:ProfileLoaded><rsp:Encoding>UTF8</rsp:Encoding>"
            "<rsp:BufferMode>Block</rsp:BufferMode><rsp:State>Connected</rsp:State>"
            "<rsp:ShellRunTime>P0DT0H0M0S</rsp:ShellRunTime><rsp:ShellInactivity>P0DT0H0M0S</rsp:ShellInactivity>"
            "</rsp:Shell>"
        )

    def _command(self, request: Request, user: str) -> str:
        shell = self._shell(request, user)
        element = request.element(f"{{{SHELL}}}CommandLine")
        command_id = element.attrib["CommandId"].upper()
        fragments = base64.b64decode(element.findtext(f"{{{SHELL}}}Arguments") or "")
        shell.begin(command_id, fragments=fragments)
        return f"<rsp:CommandResponse><rsp:CommandId>{command_id}</rsp:CommandId></rsp:CommandResponse>"

    def _send(self, request: Request, user: str) -> str:
        shell = self._shell(request, user)
        for stream in request.body.iter(f"{{{SHELL}}}Stream"):
            shell.feed(base64.b64decode(stream.text or ""), command_id=stream.attrib.get("CommandId"))
        return "<rsp:SendResponse/>"

    def _receive(self, request: Request, user: str) -> str:
        shell = self._shell(request, user)
        command_id = request.command_id
        received = shell.receive(command_id, timeout_seconds=request.timeout_seconds)
        if received is None:
            raise WsmanFaultError(soap.OPERATION_TIMED_OUT, _TIMED_OUT)
        data, done = received
        whose = f' CommandId="{command_id}"' if command_id else ""
        body = ""
        if data:
            body += f'<rsp:Stream Name="stdout"{whose}>{base64.b64encode(data).decode("ascii")}</rsp:Stream>'
        if command_id:
            body += f'<rsp:CommandState{whose} State="{SHELL}/CommandState/{"Done" if done else "Running"}"/>'
        return f"<rsp:ReceiveResponse>{body}</rsp:ReceiveResponse>"

    def _signal(self, request: Request, user: str) -> str:
        shell = self._shell(request, user)
        code = request.body.findtext(f".//{{{SHELL}}}Code") or ""
        if request.command_id:
            shell.signal(request.command_id, terminate=code.endswith("/Terminate"))
        return "<rsp:SignalResponse/>"

    def _delete(self, request: Request, user: str) -> str:
        shell = self._shell(request, user)
        shell.close()
        with self._lock:
            self._shells.pop(shell.id, None)
        return ""

    def _get(self, request: Request, user: str) -> str:
        shell = self._shell(request, user)
        return self._shell_element(shell, uri=escape(request.resource))

    def _shell(self, request: Request, user: str) -> Shell:
        with self._lock:
            self._drop_idle()
            shell = self._shells.get(request.selectors.get("ShellId", "").upper())
        if shell is None or shell.user != user:
            raise WsmanFaultError(soap.UNEXPECTED_SELECTORS, _NO_SHELL)
        return shell

    def _drop_idle(self) -> None:
        oldest = time.monotonic() - self.quotas.shell_idle_seconds
        for shell in [shell for shell in self._shells.values() if shell.used < oldest and not shell.is_busy]:
            del self._shells[shell.id]
