"""Shells of the endpoint: a runspace pool each, with its pipelines, over psrpcore's server side."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass, field

import psrpcore
from psrpcore import types

from vmsnap.testing.hyperv.dispatch import Dispatcher, PlainValue, PowerShellError, StoppedError
from vmsnap.testing.hyperv.soap import MAX_COMMANDS, UNEXPECTED_SELECTORS, WsmanFaultError
from vmsnap.testing.hyperv.wirevalues import category, exception, invocation, record, remote

_NO_COMMAND = "Der Befehl mit dieser Kennung ist nicht vorhanden."
_TOO_MANY = "Die maximale Anzahl gleichzeitiger Befehle pro Shell wurde überschritten."
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Running:
    """One pipeline. ``output`` is what the client has not fetched yet."""

    pipeline: psrpcore.ServerPipeline
    output: bytearray = field(default_factory=bytearray)
    stopped: threading.Event = field(default_factory=threading.Event)
    done: bool = False
    terminated: bool = False
    text: str = ""


class Shell:
    """One runspace pool. Methods may be called from several threads; ``_lock`` guards psrpcore's state and the buffers."""

    def __init__(
        self, shell_id: str, *, dispatcher: Dispatcher, user: str, configuration: str, max_commands: int
    ) -> None:
        self.id = shell_id
        self.user = user
        self.configuration = configuration
        self._dispatcher = dispatcher
        self._max_commands = max_commands
        self._pool = psrpcore.ServerRunspacePool()
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._output = bytearray()
        self._pipelines: dict[uuid.UUID, _Running] = {}
        self.used = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Tell whether a pipeline runs."""
        with self._lock:
            return any(not running.done for running in self._pipelines.values())

    def text_of(self, command_id: str | None) -> str:
        """Return the text of a pipeline's commands; empty where there is none."""
        if command_id is None:
            return ""
        with self._lock:
            running = self._pipelines.get(uuid.UUID(command_id))
            return running.text if running else ""

    def begin(self, command_id: str, *, fragments: bytes) -> None:
        """Begin a pipeline with its first fragments. Raises WsmanFaultError beyond the quota."""
        with self._lock:
            self.used = time.monotonic()
            if sum(not running.terminated for running in self._pipelines.values()) >= self._max_commands:
                raise WsmanFaultError(MAX_COMMANDS, _TOO_MANY)
            pipeline = psrpcore.ServerPipeline(self._pool, _pipeline_id(fragments))
            self._pipelines[uuid.UUID(command_id)] = _Running(pipeline=pipeline)
        self.feed(fragments, command_id=command_id)

    def feed(self, fragments: bytes, *, command_id: str | None = None) -> None:
        """Take fragments for the pool, or for a pipeline. A pipeline starts when it is complete."""
        with self._lock:
            self.used = time.monotonic()
            pipeline_id = self._running(uuid.UUID(command_id)).pipeline.pipeline_id if command_id else None
            self._pool.receive_data(psrpcore.PSRPPayload(fragments, psrpcore.StreamType.default, pipeline_id))
            while (event := self._pool.next_event()) is not None:
                if isinstance(event, psrpcore.CreatePipelineEvent):
                    self._start(event.pipeline_id)
            self._flush()

    def receive(self, command_id: str | None, *, timeout_seconds: float) -> tuple[bytes, bool] | None:
        """Wait for output of the pool or of a pipeline; return it and whether the pipeline is over. None: timed out."""
        end = time.monotonic() + timeout_seconds
        with self._news:
            running = self._running(uuid.UUID(command_id)) if command_id else None
            while True:
                self.used = time.monotonic()
                output = running.output if running else self._output
                done = running is not None and running.done
                if output or done:
                    data = bytes(output)
                    output.clear()
                    return data, done
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self._news.wait(left)

    def signal(self, command_id: str, *, terminate: bool) -> None:
        """Stop a pipeline, or let go of it. Content where it is gone."""
        with self._lock:
            self.used = time.monotonic()
            running = self._pipelines.get(uuid.UUID(command_id))
            if running is None:
                return
            running.stopped.set()
            running.terminated = running.terminated or terminate
            if terminate and running.done:
                del self._pipelines[uuid.UUID(command_id)]

    def close(self) -> None:
        """Stop everything that runs."""
        with self._lock:
            for running in self._pipelines.values():
                running.stopped.set()

    def _running(self, pipeline_id: uuid.UUID) -> _Running:
        running = self._pipelines.get(pipeline_id)
        if running is None:
            raise WsmanFaultError(UNEXPECTED_SELECTORS, _NO_COMMAND)
        return running

    def _start(self, pipeline_id: uuid.UUID) -> None:
        running = self._by_pipeline(pipeline_id)
        running.pipeline.start()
        metadata = running.pipeline.metadata
        running.text = "\n".join(str(command.command_text) for command in getattr(metadata, "commands", ()))
        threading.Thread(target=self._run, args=(running,), name="pipeline", daemon=True).start()

    def _run(self, running: _Running) -> None:
        streams = PipelineStreams(self, running)
        error: PowerShellError | None = None
        try:
            asked = invocation(running.pipeline.metadata, user=self.user, configuration=self.configuration)
            self._dispatcher(asked, streams)
        except StoppedError:
            pass
        except PowerShellError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001 - what a twin does wrong must reach the client, or the test would hang
            _log.exception("a dispatcher failed")
            error = PowerShellError(f"{type(raised).__name__}: {raised}", error_id="DispatcherFailed")
        with self._lock:
            if running.stopped.is_set():
                running.pipeline.stop()
            elif error is not None:
                # psrpcore has no public way to end a pipeline with an error of the caller's choice.
                running.pipeline._change_state(types.PSInvocationState.Failed, error=record(error))  # noqa: SLF001
            else:
                running.pipeline.complete()
            running.done = True
            self._flush()

    def write(self, running: _Running, *, value: PlainValue) -> None:
        """Write an object of a pipeline."""
        with self._lock:
            running.pipeline.write_output(remote(value))
            self._flush()

    def write_error(self, running: _Running, *, error: PowerShellError) -> None:
        """Write an error of a pipeline that goes on."""
        with self._lock:
            running.pipeline.write_error(
                exception(error),
                category_info=category(error),
                target_object=error.target,
                fully_qualified_error_id=error.error_id,
            )
            self._flush()

    def write_warning(self, running: _Running, *, text: str) -> None:
        """Write a warning of a pipeline."""
        with self._lock:
            running.pipeline.write_warning(text)
            self._flush()

    def write_progress(self, running: _Running, *, activity: str, percent: int) -> None:
        """Write progress of a pipeline."""
        with self._lock:
            running.pipeline.write_progress(activity, 1, f"{percent} %", percent_complete=percent)
            self._flush()

    def _flush(self) -> None:
        while (payload := self._pool.data_to_send()) is not None:
            if payload.pipeline_id is None:
                self._output.extend(payload.data)
            else:
                self._by_pipeline(payload.pipeline_id).output.extend(payload.data)
        self._news.notify_all()

    def _by_pipeline(self, pipeline_id: uuid.UUID) -> _Running:
        return next(item for item in self._pipelines.values() if item.pipeline.pipeline_id == pipeline_id)


def _pipeline_id(fragments: bytes) -> uuid.UUID:
    """Return the id that a pipeline has in its messages ([MS-PSRP] 2.2.1, 2.2.4).

    Windows goes by the command's id of WS-Management, and some clients write this one in another order of bytes.
    """
    return uuid.UUID(bytes_le=fragments[45:61])


class PipelineStreams:
    """What a dispatcher writes to (``vmsnap.testing.hyperv.dispatch.Streams``)."""

    def __init__(self, shell: Shell, running: _Running) -> None:
        self._shell = shell
        self._running = running

    @property
    def stopped(self) -> threading.Event:
        """Return what is set when the client stops the pipeline."""
        return self._running.stopped

    def write(self, value: PlainValue) -> None:
        """Write an object."""
        self._check()
        self._shell.write(self._running, value=value)

    def error(self, record: PowerShellError) -> None:
        """Write an error that does not end the pipeline."""
        self._check()
        self._shell.write_error(self._running, error=record)

    def warning(self, text: str) -> None:
        """Write a warning."""
        self._check()
        self._shell.write_warning(self._running, text=text)

    def progress(self, activity: str, *, percent: int) -> None:
        """Write a progress record."""
        self._check()
        self._shell.write_progress(self._running, activity=activity, percent=percent)

    def wait(self, seconds: float) -> None:
        """Wait, unless stopped."""
        if self._running.stopped.wait(seconds):
            raise StoppedError

    def _check(self) -> None:
        if self._running.stopped.is_set():
            raise StoppedError
