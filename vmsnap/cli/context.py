"""What one invocation knows: its options, its output, and the application behind it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vmsnap.cli.cancel import SignalCancel, cancelled_by_signals
from vmsnap.cli.failures import print_json
from vmsnap.cli.logs import set_up_logging
from vmsnap.errors import BugError

if TYPE_CHECKING:
    from vmsnap.cli.application import Application
    from vmsnap.cli.progress import PlainProgress, SilentProgress, TerminalProgress
    from vmsnap.config.policies import PolicyBook
    from vmsnap.config.settings import Settings
    from vmsnap.model.guest import Finding

ApplicationFactory = Callable[["Settings", "PolicyBook"], "Application"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The configuration file. [default: $VMSNAP_CONFIG, else /etc/vmsnap/vmsnap.toml]",
        show_default=False,
    ),
]


def bootstrap(settings: Settings, policies: PolicyBook) -> Application:
    """Return the real application. The drivers are loaded here and not before: ``--help`` needs none of them."""
    from vmsnap.bootstrap import open_application  # noqa: PLC0415

    return open_application(settings, policies)


def _now() -> datetime:
    return datetime.now(UTC)


class Session:
    """One invocation. Settings, policies and application are opened when first used."""

    def __init__(self, *, open_application: ApplicationFactory = bootstrap, now: Callable[[], datetime] = _now) -> None:
        self._open_application = open_application
        self.now = now
        self.json = False
        self.debug = False
        self.config: Path | None = None

    @cached_property
    def settings(self) -> Settings:
        """Return the settings. Raises ConfigError."""
        from vmsnap.config.settings import load_settings  # noqa: PLC0415

        return load_settings(self.config)

    @cached_property
    def policies(self) -> PolicyBook:
        """Return the policies. Raises ConfigError."""
        from vmsnap.config.policies import PolicyBook  # noqa: PLC0415

        return PolicyBook(self.settings.policies)

    @cached_property
    def application(self) -> Application:
        """Return the application. Raises any VmsnapError."""
        return self._open_application(self.settings, self.policies)

    def settings_warnings(self) -> tuple[Finding, ...]:
        """Return what in the settings of metrics and notifications is wrong, or unwise. Sends nothing."""
        from vmsnap.config.settings import settings_path  # noqa: PLC0415
        from vmsnap.oversight import findings_of  # noqa: PLC0415

        found = findings_of(self.settings, file=settings_path(self.config))
        return tuple(finding for finding in found if finding.severity.value != "ok")

    def silence_warnings(self) -> tuple[Finding, ...]:
        """Return a warning where nobody is told when backups fail."""
        from vmsnap.oversight import silence_of  # noqa: PLC0415

        return silence_of(self.settings)

    @cached_property
    def out(self) -> Console:
        """Return the console for results."""
        return _console(sys.stdout)

    @cached_property
    def err(self) -> Console:
        """Return the console for progress, logs and errors."""
        return _Errors(file=sys.stderr, highlight=False, markup=False, emoji=False)

    def set_options(self, *, json: bool, config: Path | None) -> None:
        """Take the options of a command beside those given before it; the command's file wins."""
        self.json = self.json or json
        self.config = config or self.config

    def set_logging(self, *, verbose: bool, debug: bool) -> None:
        """Say how much to log."""
        self.debug = debug
        set_up_logging(self.err, level=logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)

    def show(self, document: object, *, human: Callable[[Console], None]) -> None:
        """Print a result: the document for scripts, or for people by ``human``."""
        if self.json:
            print_json(document, stream=sys.stdout)
        else:
            human(self.out)
            self.out.file.flush()

    @contextmanager
    def running(self) -> Iterator[tuple[TerminalProgress | PlainProgress | SilentProgress, SignalCancel]]:
        """Give a long command its progress and its Cancel."""
        from vmsnap.cli.progress import PlainProgress, SilentProgress, TerminalProgress  # noqa: PLC0415

        on_terminal = self.err.is_terminal

        def announce() -> None:
            if not on_terminal:  # there, the moving line says so
                _tell("stopping: what was made is being undone")

        with cancelled_by_signals(announce=announce) as cancel:
            progress: TerminalProgress | PlainProgress | SilentProgress
            if on_terminal:
                progress = TerminalProgress(self.err, stopping=cancel.is_set)
            elif self.json:
                progress = SilentProgress()
            else:
                progress = PlainProgress(sys.stderr)
            with progress:
                yield progress, cancel

    @contextmanager
    def serving(self) -> Iterator[tuple[PlainProgress | SilentProgress, SignalCancel]]:
        """Give a command that goes on until it is stopped its progress and its Cancel. Being stopped is no failure."""
        from vmsnap.cli.progress import PlainProgress, SilentProgress  # noqa: PLC0415

        with cancelled_by_signals(announce=lambda: None) as cancel:
            progress = SilentProgress() if self.json else PlainProgress(sys.stderr)
            with progress:
                yield progress, cancel

    @contextmanager
    def unstoppable(self) -> Iterator[None]:
        """Run a command that is clean-up itself to its end, whatever signal comes. Its steps have deadlines."""
        with cancelled_by_signals(announce=lambda: _tell("finishing what was begun, then stopping")):
            yield


def _tell(text: str) -> None:
    # A bare write: a signal may have come in the middle of anything, printing included.
    os.write(2, f"vmsnap: {text}\n".encode())


def session_of(ctx: typer.Context) -> Session:
    """Return the invocation's session."""
    found: Any = ctx.find_root().obj
    if not isinstance(found, Session):
        raise BugError("a command ran without a session")
    return found


def begin(ctx: typer.Context, *, json: bool, config: Path | None) -> Session:
    """Return the session with the command's own options in it. Every command begins with this."""
    session = session_of(ctx)
    session.set_options(json=json, config=config)
    return session


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # The reader has seen enough ('| head'). That is no failure, and flushing at exit must not make it one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)


class _Errors(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process here. A log line that nobody reads must end neither a run nor its undoing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _console(stream: Any) -> Console:
    return _Console(file=stream, highlight=False, markup=False, emoji=False)
