"""How far a run is: alive on a terminal, one line a step elsewhere, nothing where nobody looks."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vmsnap.cli.text import printable, seconds, size

_BAR_WIDTH = 24
_NAME_WIDTH = 22


class SilentProgress:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, name: str) -> None:
        """A step began."""

    def bytes_done(self, done: int, total: int) -> None:
        """Bytes of the present step that are done."""

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """The present step waits."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class PlainProgress:
    """One line a step, with the seconds since the beginning. No control characters. Never raises."""

    def __init__(self, stream: TextIO, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._monotonic = monotonic
        self._start = monotonic()
        self._said = ""
        self._any_step = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._any_step:
            self._line("done" if kind is None else "failed")

    def step(self, name: str) -> None:
        """A step began."""
        self._any_step = True
        self._line(name)

    def bytes_done(self, done: int, total: int) -> None:
        """Bytes are for terminals."""

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """Say what is waited for, once."""
        if what != self._said:
            self._said = what
            self._line(f"  waiting for {what}, at most {seconds(deadline_seconds)}")

    def note(self, text: str) -> None:
        """Say it."""
        self._line(f"  {text}")

    def _line(self, text: str) -> None:
        try:
            self._stream.write(f"[{self._monotonic() - self._start:7.1f} s] {printable(text)}\n")
            self._stream.flush()
        except (OSError, ValueError):
            # A reader that went away must not end the run.
            self._stream = _Nowhere()


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


class TerminalProgress:
    """A line that moves for the present step, and one line that stays for each step done. Never raises.

    ``stopping`` tells whether a signal asked the run to stop. Methods may be called from any thread.
    """

    def __init__(
        self, console: Console, *, stopping: Callable[[], bool], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._stopping = stopping
        self._monotonic = monotonic
        self._lock = threading.RLock()
        self._spinner = Spinner("dots" if _speaks_unicode(console) else "line")
        self._waiting_for: str | None = None
        self._begin("starting")
        self._any_step = False
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._end_step(failed=kind is not None)
        self._live.stop()

    def step(self, name: str) -> None:
        """A step began; the one before it is over."""
        with self._lock:
            self._end_step(failed=False)
            self._any_step = True
            self._begin(name)

    def bytes_done(self, done: int, total: int) -> None:
        """Bytes of the present step that are done."""
        with self._lock:
            self._done, self._total = done, total

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """The present step waits for something, at most that long."""
        with self._lock:
            self._waiting_for = what
            self._deadline = self._monotonic() + deadline_seconds

    def note(self, text: str) -> None:
        """Print a line above the moving one."""
        self._print(Text(f"    {printable(text)}", style="yellow"))

    def _begin(self, name: str) -> None:
        self._name = name
        self._began = self._monotonic()
        self._done = self._total = 0
        self._waiting_for = None
        self._deadline = 0.0

    def _end_step(self, *, failed: bool) -> None:
        if not self._any_step:
            return
        unicode = _speaks_unicode(self._console)
        mark = ("\N{BALLOT X}" if unicode else "x") if failed else ("\N{CHECK MARK}" if unicode else "+")
        line = Text(f"  {mark} ", style="red" if failed else "green")
        line.append(f"{printable(self._name):<{_NAME_WIDTH}}", style="default")
        line.append(f"{seconds(self._monotonic() - self._began):>12}", style="dim")
        if self._total:
            line.append(f"   {size(self._done)}", style="dim")
        self._print(line)
        self._any_step = False

    def _print(self, text: Text) -> None:
        try:
            self._console.print(text)
        except (OSError, ValueError):
            self._console.file = _Nowhere()

    def _render(self) -> Table:
        with self._lock:
            now = self._monotonic()
            row = Table.grid(padding=(0, 1))
            cells: list[Text | Spinner | ProgressBar] = [
                Text(" "),
                self._spinner,
                Text(f"{printable(self._name):<{_NAME_WIDTH}}", style="bold"),
                Text(f"{seconds(now - self._began):>11}"),
            ]
            if self._stopping():
                cells.append(Text("stopping: undoing what was made", style="yellow"))
            elif self._total:
                cells.append(ProgressBar(total=self._total, completed=self._done, width=_BAR_WIDTH))
                cells.append(Text(f"{size(self._done)} of {size(self._total)}", style="cyan"))
                cells.append(Text(self._rate(now), style="dim"))
            elif self._waiting_for is not None:
                left = seconds(max(0.0, self._deadline - now))
                cells.append(Text(f"waiting for {printable(self._waiting_for)}, at most {left} more", style="cyan"))
            row.add_row(*cells)
            return row

    def _rate(self, now: float) -> str:
        elapsed = now - self._began
        return f"{size(int(self._done / elapsed))}/s" if elapsed > 0.5 else ""


def _speaks_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
