from __future__ import annotations

import io
import logging
import signal
import threading
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vmsnap.cli.cancel import cancelled_by_signals
from vmsnap.cli.failures import print_error
from vmsnap.cli.logs import ConsoleHandler, set_up_logging
from vmsnap.cli.progress import PlainProgress, SilentProgress, TerminalProgress
from vmsnap.cli.tables import print_table
from vmsnap.cli.text import columns, count, milliseconds, minute, moment, printable, printable_lines, seconds, size
from vmsnap.errors import CancelledError, CleanupError, ToolError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (102_298, "99.9 KiB"),
        (102_400, "100 KiB"),
        (1_048_575, "1.0 MiB"),
        (300 << 20, "300 MiB"),
        (8 << 30, "8.0 GiB"),
        (1 << 40, "1.0 TiB"),
        (5000 << 50, "5000 PiB"),
    ],
)
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(4.21, "4.2 ms"), (23.4, "23 ms"), (999, "999 ms"), (1400, "1.4 s")])
def test_milliseconds(value: float, text: str) -> None:
    assert milliseconds(value) == text


def test_times_are_in_utc() -> None:
    value = datetime(2026, 11, 21, 3, 0, 5, tzinfo=timezone(timedelta(hours=1)))
    assert moment(value) == "2026-11-21 02:00:05Z"
    assert minute(value) == "2026-11-21 02:00Z"
    assert moment(None, none="never") == "never"


def test_counts() -> None:
    assert [count(number, thing="block") for number in (0, 1, 2)] == ["no blocks", "1 block", "2 blocks"]


@given(st.text())
def test_what_is_printed_cannot_control_a_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert all(line.isprintable() for line in printable_lines(text))
    if text.isprintable():
        assert shown == text


def test_undecodable_names_are_printed_too() -> None:
    assert printable("a\udcff\x9b") == "a\\udcff\\x9b"


@given(st.lists(st.lists(st.text(alphabet="ab ", max_size=5), min_size=3, max_size=3), max_size=4))
def test_columns_begin_at_the_same_place(rows: list[list[str]]) -> None:
    lines = columns(("A", "B", "C"), rows)
    assert len(lines) == len(rows) + 1
    assert all(line == line.rstrip() for line in lines)
    width = max(len(row[0]) for row in (["A"], *rows)) + 2
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.ljust(width)[:width] == row[0].ljust(width)


def test_a_stream_that_fails_does_not_end_the_run() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, monotonic=lambda: 1.0)
    with progress:
        progress.step("capture")
        stream.close()
        progress.step("drain")
        progress.note("still here")


def test_plain_progress_says_how_it_ended() -> None:
    clock = iter([0.0, 0.5, 12.25, 90.0])
    stream = io.StringIO()
    progress = PlainProgress(stream, monotonic=lambda: next(clock))

    def fail() -> None:
        with progress:
            progress.step("capture")
            progress.bytes_done(1, 2)
            progress.waiting("x", deadline_seconds=5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue() == "[    0.5 s] capture\n[   12.2 s]   waiting for x, at most 5.0 s\n[   90.0 s] failed\n"


def test_silent_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentProgress() as progress:
        progress.step("capture")
        progress.bytes_done(1, 2)
        progress.waiting("x", deadline_seconds=1)
        progress.note("y")
    assert capsys.readouterr() == ("", "")


def test_terminal_progress_takes_reports_from_any_thread() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with TerminalProgress(console, stopping=lambda: False) as progress:
        progress.step("store")
        threads = [threading.Thread(target=progress.bytes_done, args=(number, 100)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        progress.step("done")


def test_a_wide_terminal_has_every_column() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    with console.capture() as capture:
        print_table(console, header=("GUEST", "SIZE"), rows=[("two\nwords", "1 B")], spare=("SIZE",))
    assert [line.split() for line in capture.get().splitlines()][1] == ["GUEST", "SIZE"]
    assert "two\\nwords" in capture.get()
    assert "Not shown" not in capture.get()


def test_an_error_on_a_terminal_is_told_whole() -> None:
    error = CleanupError("left\x07 something", causes=[ToolError("the bridge is busy")])
    error.also.append(ToolError("also this", details="one\ntwo", remedy="look"))
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    with console.capture() as capture:
        print_error(error, console=console, stream=io.StringIO())
    assert capture.get() == (
        "Error: left\\x07 something\n"
        "  the bridge is busy\n"
        f"What to do: {error.remedy}\n"
        "Also: also this\n"
        "  one\n"
        "  two\n"
        "  What to do: look\n"
    )


@pytest.mark.parametrize(
    ("act", "shown"),
    [
        ("bytes", "512 MiB of 1.0 GiB"),
        ("waiting", "waiting for 3 transactions, at most 40.0 s more"),
        ("stopping", "stopping: undoing what was made"),
    ],
)
def test_the_moving_line_says_what_is_going_on(act: str, shown: str) -> None:
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    progress = TerminalProgress(console, stopping=lambda: act == "stopping", monotonic=lambda: now[0])
    progress.step("drain")
    if act == "bytes":
        progress.bytes_done(512 << 20, 1 << 30)
    else:
        progress.waiting("3 transactions", deadline_seconds=60)
    now[0] = 20.0
    with console.capture() as capture:
        console.print(progress._render())
    assert "drain" in capture.get()
    assert shown in capture.get()


def test_a_signal_sets_the_event_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    announced = []
    with cancelled_by_signals(announce=lambda: announced.append(1)) as cancel:
        cancel.check()
        assert not cancel.is_set()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert cancel.is_set()
        with pytest.raises(CancelledError, match="SIGTERM"):
            cancel.check()
    assert announced == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cancelled_by_signals(announce=lambda: None) as cancel:
            signal.raise_signal(signal.SIGHUP)
            assert not cancel.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_log_lines_carry_run_guest_and_step_and_no_control_characters() -> None:
    stream = io.StringIO()
    root, logger = logging.getLogger(), logging.getLogger("vmsnap")
    level = logger.level
    try:
        set_up_logging(Console(file=stream, width=40), level=logging.INFO)
        extra = {"run": "3fa9b0c1d2", "guest": "db\x1b1", "step": "capture"}
        logging.getLogger("vmsnap.some.driver").info("took %s and %s", "x" * 60, "\x07", extra=extra)
        logging.getLogger("vmsnap.some.driver").debug("too much")
        logging.getLogger("library").info("other people's secrets")
        logging.getLogger("library").warning("mind this")
    finally:
        logger.setLevel(level)
        for handler in list(root.handlers):
            if isinstance(handler, ConsoleHandler):
                root.removeHandler(handler)
    assert stream.getvalue() == (
        f"info: [run=3fa9b0c1d2 guest=db\\x1b1 step=capture] took {'x' * 60} and \\x07\nwarning: mind this\n"
    )
