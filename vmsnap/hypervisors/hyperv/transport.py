"""Scripts on a Hyper-V host, over PowerShell remoting ([MS-PSRP] over [MS-WSMV]) with pypsrp.

Sessions (runspace pools) are kept while they are used: HTTP.sys drops a connection after two minutes of silence, and with
it the keys of encrypted messages, so a session that was idle for longer than a little less is closed and another opened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from pypsrp.complex_objects import GenericComplexObject, ObjectMeta, PSCredential, PSInvocationState
from pypsrp.powershell import PowerShell, RunspacePool
from pypsrp.wsman import WSMan

from vmsnap.errors import (
    CancelledError,
    DeadlineError,
    DriverError,
    HostUnreachableError,
    PreconditionError,
    UnknownOutcomeError,
)
from vmsnap.hypervisors.hyperv.connection import HostConnection, Login, Parameter, Row
from vmsnap.hypervisors.hyperv.failures import ErrorRecord
from vmsnap.hypervisors.hyperv.refusals import LIBRARY_ERRORS, Stage, translate
from vmsnap.ports.clock import Cancel

_IDLE = timedelta(seconds=90)
_POLL_SECONDS = 5
_CANCEL_POLL_SECONDS = 1
_READ_MARGIN_SECONDS = 30
_GOODBYE_SECONDS = 5
# Whole messages, with whatever parameters they carry, and tokens of logins; what fails is told by our own errors.
_TALKATIVE = ("pypsrp", "spnego", "requests_credssp")
_NO_STREAM_OPTIONS = 0
"""No invocation info with records: it would send a script's parameters back."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """What to run: the text of a script, or, where ``is_name``, the name of a function that the host has."""

    text: str
    is_name: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a script that ended left. With errors it may have done nothing, or some of its work."""

    rows: tuple[Row, ...]
    errors: tuple[ErrorRecord, ...]


class Transport:
    """Runs scripts on one host. Methods may be called from several threads; each then has a session of its own."""

    def __init__(self, connection: HostConnection) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._idle: list[_Session] = []
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def run(
        self, script: Script, *, parameters: Mapping[str, Parameter], timeout: timedelta, cancel: Cancel | None = None
    ) -> Outcome:
        """Run a script to its end.

        Raises HostUnreachableError, PreconditionError where it was not run; UnknownOutcomeError where the line broke and
        nobody knows; DeadlineError, CancelledError where it was stopped at some point of its work.
        """
        session = self._take()
        while True:
            try:
                outcome = session.run(script, parameters=parameters, timeout=timeout, cancel=cancel)
            except (HostUnreachableError, PreconditionError):
                # It was not run. A session that waited may have died meanwhile; a new one has no such excuse.
                session.discard()
                if session.is_new:
                    raise
            except BaseException:
                session.discard()
                raise
            else:
                self._give_back(session)
                return outcome
            session = _Session(self.connection)

    def close(self) -> None:
        """Close all sessions. May be repeated; another ``run`` opens one again."""
        with self._lock:
            sessions, self._idle = self._idle, []
        for session in sessions:
            session.close()

    def _take(self) -> _Session:
        with self._lock:
            stale = [session for session in self._idle if session.is_stale]
            fresh = [session for session in self._idle if not session.is_stale]
            found = fresh.pop() if fresh else None
            self._idle = fresh
        for session in stale:
            session.discard()
        return found or _Session(self.connection)

    def _give_back(self, session: _Session) -> None:
        if session.is_usable:
            with self._lock:
                self._idle.append(session)
        else:
            session.discard()


class _Session:
    """One runspace pool, used by one thread at a time."""

    def __init__(self, connection: HostConnection) -> None:
        self._connection = connection
        self._pool: RunspacePool | None = None
        self._used = time.monotonic()
        self.is_usable = True
        self.is_new = True

    @property
    def is_stale(self) -> bool:
        return time.monotonic() - self._used > _IDLE.total_seconds()

    def run(
        self, script: Script, *, parameters: Mapping[str, Parameter], timeout: timedelta, cancel: Cancel | None
    ) -> Outcome:
        pool = self._opened(with_keys=any(isinstance(value, Login) for value in parameters.values()))
        pipeline = PowerShell(pool)
        if script.is_name:
            pipeline.add_cmdlet(script.text)
        else:
            pipeline.add_script(script.text, use_local_scope=True)
        for name, value in parameters.items():
            pipeline.add_parameter(name, _serialisable(value, pool=pool))
        try:
            pipeline.begin_invoke(remote_stream_options=_NO_STREAM_OPTIONS)
        except LIBRARY_ERRORS as error:
            raise translate(error, stage=Stage.ASKING, connection=self._connection) from error
        self._listen(pipeline, timeout=timeout, cancel=cancel)
        outcome = self._outcome(pipeline)
        try:
            pipeline.close()
        except LIBRARY_ERRORS:
            self.is_usable = False
        self._used = time.monotonic()
        self.is_new = False
        return outcome

    def _opened(self, *, with_keys: bool) -> RunspacePool:
        try:
            if self._pool is None:
                self._pool = _pool(self._connection)
                self._pool.open()
            if with_keys:
                self._pool.exchange_keys()
        except LIBRARY_ERRORS as error:
            raise translate(error, stage=Stage.OPENING, connection=self._connection) from error
        return self._pool

    def _listen(self, pipeline: PowerShell, *, timeout: timedelta, cancel: Cancel | None) -> None:
        """Wait until the pipeline is over; stop it where it may not go on."""
        wsman = pipeline.runspace_pool.connection
        end = time.monotonic() + timeout.total_seconds()
        longest = _POLL_SECONDS if cancel is None else _CANCEL_POLL_SECONDS
        usual, patience = wsman.operation_timeout, wsman.transport.read_timeout
        wsman.transport.read_timeout = longest + _READ_MARGIN_SECONDS
        try:
            while pipeline.state == PSInvocationState.RUNNING:
                left = end - time.monotonic()
                if left <= 0:
                    self._stop(pipeline)
                    raise DeadlineError(
                        f"a script on {self._connection.where} did not end in {timeout.total_seconds():g} s; it was stopped",
                        remedy="look what keeps the host busy; 'vmsnap reconcile' removes what the script may have made",
                    )
                if cancel is not None:
                    self._check(cancel, pipeline)
                wsman.operation_timeout = max(1, min(longest, round(left)))
                pipeline.poll_invoke()
        except LIBRARY_ERRORS as error:
            raise translate(error, stage=Stage.LISTENING, connection=self._connection) from error
        finally:
            wsman.operation_timeout, wsman.transport.read_timeout = usual, patience

    def _check(self, cancel: Cancel, pipeline: PowerShell) -> None:
        try:
            cancel.check()
        except CancelledError:
            self._stop(pipeline)
            raise

    @staticmethod
    def _stop(pipeline: PowerShell) -> None:
        # A pipeline that is left alone goes on, and counts against a quota.
        with suppress(*LIBRARY_ERRORS):
            pipeline.stop()

    def _outcome(self, pipeline: PowerShell) -> Outcome:
        errors = tuple(_record(error) for error in pipeline.streams.error)
        if pipeline.state == PSInvocationState.STOPPED or (pipeline.state == PSInvocationState.FAILED and not errors):
            raise UnknownOutcomeError(
                f"{self._connection.where} ended a script that was not over",
                remedy="'vmsnap reconcile' looks for what bears the run's id, and removes it",
            )
        return Outcome(rows=tuple(_row(value) for value in pipeline.output), errors=errors)

    def close(self) -> None:
        """Close the session in order."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.connection.operation_timeout = _GOODBYE_SECONDS
            with suppress(*LIBRARY_ERRORS):
                pool.close()
            pool.connection.close()

    def discard(self) -> None:
        """Close the session over a new connection: the old one, and its keys, may be gone. The host stops what runs in it."""
        if self._pool is not None:
            transport = self._pool.connection.transport
            transport.close()
            transport.session = None
            transport.encryption = None
            transport.connection_timeout = _GOODBYE_SECONDS
            transport.read_timeout = 2 * _GOODBYE_SECONDS
            self.close()


def _pool(connection: HostConnection) -> RunspacePool:
    operation = round(connection.operation_timeout.total_seconds())
    wsman = WSMan(
        connection.host,
        port=connection.port,
        ssl=connection.tls,
        auth=connection.authentication.value,
        username=connection.login.user if connection.login else None,
        password=connection.login.password if connection.login else None,
        cert_validation=connection.authority or True,  # type: ignore[arg-type] # a path is what requests takes
        certificate_pem=connection.certificate,
        certificate_key_pem=connection.key or connection.certificate,
        connection_timeout=round(connection.connect_timeout.total_seconds()),
        operation_timeout=operation,
        read_timeout=operation + _READ_MARGIN_SECONDS,
        no_proxy=True,
        negotiate_service="WSMAN",
    )
    return RunspacePool(wsman, configuration_name=connection.configuration)


def _serialisable(value: Parameter, *, pool: RunspacePool) -> object:
    if isinstance(value, Login):
        return PSCredential(username=value.user, password=value.password)  # type: ignore[no-untyped-call]
    if isinstance(value, int) and not isinstance(value, bool):
        # pypsrp calls every number a 32-bit one.
        return pool.serialize(value, ObjectMeta("I64"))
    return value if isinstance(value, str | bool) else list(value)


def _record(error: object) -> ErrorRecord:
    exception = getattr(error, "exception", None)
    properties = exception.adapted_properties if isinstance(exception, GenericComplexObject) else {}
    hresult = properties.get("HResult")
    message = properties.get("Message") or getattr(error, "details_message", None) or str(error)
    return ErrorRecord(
        error_id=str(getattr(error, "fq_error", "") or ""),
        hresult=hresult if isinstance(hresult, int) else 0,
        category=str(getattr(error, "reason", "") or ""),
        message=str(message),
    )


def _row(value: object) -> Row:
    if not isinstance(value, GenericComplexObject):
        raise DriverError(f"a script on the Hyper-V host emitted a {type(value).__name__} instead of an object")
    properties = {**value.adapted_properties, **value.extended_properties}
    return {str(name): _flat(item, name=str(name)) for name, item in properties.items()}


def _flat(value: object, *, name: str) -> object:
    if isinstance(value, list):
        return tuple(_flat(item, name=name) for item in value)
    if isinstance(value, GenericComplexObject) and len(value.property_sets) == 1:
        value = value.property_sets[0]  # a text that carries properties, as some cmdlets return them
    if value is None or isinstance(value, str | int | float):
        return value
    raise DriverError(
        f"a script on the Hyper-V host emitted a {type(value).__name__} as {name}; texts and numbers are read"
    )
