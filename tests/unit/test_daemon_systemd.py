"""What the daemon says to systemd, and how its lines look in the journal."""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.daemon.logs import LineFormatter, set_up_logging
from vmsnap.daemon.notify import Systemd


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        yield listener


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_each_word_arrives_and_no_child_can_speak_in_its_name(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    systemd = Systemd(environment)
    assert environment == {}
    assert systemd.watchdog == timedelta(seconds=3)
    systemd.ready()
    assert heard(manager) == ["READY=1"]
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    systemd.reloading()
    word, moment = heard(manager)
    assert word == "RELOADING=1"
    name, _, value = moment.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    systemd.alive()
    assert heard(manager) == ["WATCHDOG=1"]
    systemd.status("one\ntwo\x1b[31m\nREADY=1" + "x" * 1000)
    (line,) = heard(manager)
    assert line.startswith("STATUS=one two [31m READY=1xxx")
    assert len(line) < 500
    systemd.stopping()
    assert heard(manager) == ["STOPPING=1"]


def test_a_name_in_the_abstract_space_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0vmsnap-test-{os.getpid()}")
        listener.settimeout(5)
        Systemd({"NOTIFY_SOCKET": f"@vmsnap-test-{os.getpid()}"}).ready()
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}],
    ids=["nothing", "no number", "zero", "another process"],
)
def test_without_a_watchdog_there_is_nothing_to_feed(environment: dict[str, str]) -> None:
    systemd = Systemd(environment)
    assert systemd.watchdog is None
    systemd.alive()


def test_nobody_there_is_no_failure(tmp_path: Path) -> None:
    Systemd({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    Systemd({}).ready()


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    changed = [logging.getLogger(name) for name in ("", "vmsnap", "vmsnap.workflow.run")]
    handlers, levels = changed[0].handlers[:], [logger.level for logger in changed]
    yield
    changed[0].handlers[:] = handlers
    for logger, level in zip(changed, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("_logging_as_before")
def test_each_record_is_one_line_with_its_level_for_the_journal() -> None:
    stream = io.StringIO()
    set_up_logging(stream, level=logging.INFO, environment={"JOURNAL_STREAM": "8:1"})
    log = logging.getLogger("vmsnap.test")
    log.info("snapshot %s is stored", "3fa9", extra={"guest": "db\n<0>forged"})
    log.warning("two\nlines\x1b[31m")
    log.debug("not wanted")
    logging.getLogger("vmsnap.workflow.run").info("said by the progress already")
    logging.getLogger("paramiko").info("not wanted")
    log.error("failed", exc_info=ZeroDivisionError("no"))
    first, second, third = stream.getvalue().splitlines()
    assert first == "<6>snapshot 3fa9 is stored [guest=db <0>forged]"
    assert second == "<4>two | lines [31m"
    assert third.startswith("<3>failed | ZeroDivisionError: no")


def test_elsewhere_lines_have_time_and_level() -> None:
    record = logging.LogRecord("vmsnap", logging.ERROR, "", 0, "it failed", None, None)
    assert LineFormatter(for_journal=False).format(record).endswith(" error: it failed")
