"""One life of the daemon: signals, words to systemd, the lock, and what it leaves."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.test_daemon import Hanging, Listener
from vmsnap.config.settings import Settings
from vmsnap.daemon.duties import Duties
from vmsnap.daemon.notify import Systemd
from vmsnap.daemon.service import Daemon
from vmsnap.errors import BusyError, CleanupError, ConfigError, PreconditionError
from vmsnap.model.report import DaemonReport
from vmsnap.ports.observer import Observer
from vmsnap.testing.threads import no_thread_left
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.world import World


class Life:
    """A daemon over a fake world, with a script that runs beside it and sends it signals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lab = FakeWorld(folder / "world")
        self.config = folder / "vmsnap.toml"
        (folder / "policies").mkdir()
        self.listener = Listener()
        self.observers: tuple[Observer, ...] = (self.listener,)
        self.opened: list[Settings] = []
        self.change: Callable[[World], World] = lambda world: world
        self.words: list[str] = []
        self.environment: dict[str, str] = {}
        self.settings()

    def settings(self, text: str = "") -> None:
        self.config.write_text(f'[store]\npath = "/srv"\n[state]\npath = "{self.folder}"\n{text}')

    def policy(self, guest: str, text: str = "") -> None:
        (self.folder / "policies" / f"{guest}.toml").write_text(text)

    def open_world(self, _settings: Settings) -> World:
        return self.change(self.lab.process())

    def open_observers(self, settings: Settings, _world: World) -> Sequence[Observer]:
        self.opened.append(settings)
        return self.observers

    def run(self, script: Callable[[Life], None] = lambda _life: None) -> DaemonReport:
        """Run the daemon in this thread, and the script beside it; when that ends, SIGTERM."""
        with self._manager() as path:
            systemd = Systemd({"NOTIFY_SOCKET": path, **self.environment})
            daemon = Daemon(
                self.config, open_world=self.open_world, open_observers=self.open_observers, systemd=systemd
            )
            failures: list[BaseException] = []

            def beside() -> None:
                try:
                    self.wait_for(lambda: "READY=1" in self.words)
                    script(self)
                except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
                    failures.append(error)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)

            thread = threading.Thread(target=beside)
            thread.start()
            try:
                return daemon.run()
            finally:
                thread.join()
                if failures:
                    raise failures[0]

    @contextmanager
    def _manager(self) -> Iterator[str]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            path = str(self.folder / "notify")
            listener.bind(path)

            def listen() -> None:
                while (said := listener.recv(4096).decode()) != "end":
                    self.words.extend(said.split("\n"))

            thread = threading.Thread(target=listen)
            thread.start()
            try:
                yield path
            finally:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"end", path)
                thread.join()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, (self.words, self.listener)
            time.sleep(0.005)

    def reload(self) -> None:
        before = self.words.count("READY=1")
        os.kill(os.getpid(), signal.SIGHUP)
        self.wait_for(lambda: self.words.count("READY=1") > before)

    def snapshots(self, guest: str = "db") -> int:
        return len(self.lab.store.snapshots(guest))


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    # What a test fails to send to the daemon must not end the tests.
    signal.signal(signal.SIGTERM, lambda *_: None)
    yield Life(tmp_path)
    signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_it_gets_ready_backs_up_and_ends_in_order(life: Life) -> None:
    life.policy("db")
    with no_thread_left():
        report = life.run(lambda life: life.wait_for(lambda: bool(life.listener.runs)))
    assert (report.backups, report.failures) == (1, 0)
    assert life.snapshots() == 1
    words = [word for word in life.words if not word.startswith("STATUS=")]
    assert words == ["READY=1", "STOPPING=1"]
    assert any(word.startswith("STATUS=1 guest; doing ") for word in life.words)
    assert life.lab.state.held == {}


def test_a_reload_takes_what_is_good_and_refuses_what_is_wrong(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vmsnap")
    life.policy("db", "enabled = false")

    def script(life: Life) -> None:
        life.wait_for(lambda: bool(life.listener.ticks))
        life.policy("db", "nonsense = 1")
        life.settings("nonsense = 1")
        life.reload()
        assert "RELOADING=1" in life.words
        assert any(word.startswith("MONOTONIC_USEC=") for word in life.words)
        refused = [word for word in life.words if word.startswith("STATUS=") and "refused" in word]
        assert "refused vmsnap.toml, db.toml: see the log" in refused[-1]
        assert life.opened == life.opened[:1]
        life.policy("db", 'schedule.every = "5h"')
        life.settings("[daemon]\ntick = '1s'")
        life.reload()
        life.wait_for(lambda: bool(life.listener.runs))

    life.run(script)
    assert life.snapshots() == 1
    said = [record.getMessage() for record in caplog.records]
    (policy,) = [line for line in said if "db.toml" in line and line.startswith("refused")]
    assert "what it said before stays" in policy
    assert [settings.daemon.tick.total_seconds() for settings in life.opened] == [30, 1]


def test_a_stop_in_the_middle_of_a_run_leaves_nothing(life: Life) -> None:
    hanging = Hanging("db")
    life.change = hanging
    life.policy("db")

    def script(life: Life) -> None:
        assert hanging.entered.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)
        life.wait_for(lambda: "STOPPING=1" in life.words)
        life.wait_for(lambda: "STATUS=stopping: waiting for backup of db" in life.words)
        hanging.go_on.set()

    report = life.run(script)
    assert (report.backups, report.failures) == (0, 0)
    assert life.lab.leftovers() == ()
    assert life.lab.unfinished() == ()
    assert life.lab.state.held == {}


def test_what_does_not_end_in_time_is_named(life: Life) -> None:
    hanging = Hanging("db")
    life.change = hanging
    life.policy("db")
    life.settings("[daemon]\nstop_deadline = '100ms'")

    def script(_life: Life) -> None:
        assert hanging.entered.wait(10)

    with pytest.raises(CleanupError) as caught:
        life.run(script)
    assert caught.value.exit_code == 8
    assert caught.value.details == "backup of db did not end"
    hanging.go_on.set()


def test_there_is_one_daemon(life: Life) -> None:
    with life.lab.state.locks.daemon(), pytest.raises(BusyError) as caught:
        Daemon(life.config, open_world=life.open_world, open_observers=life.open_observers, systemd=Systemd({})).run()
    assert caught.value.exit_code == 4
    assert life.opened == []


def test_settings_that_cannot_be_used_end_it(life: Life) -> None:
    life.settings("nonsense = 1")
    with pytest.raises(ConfigError):
        Daemon(life.config, open_world=life.open_world, open_observers=life.open_observers, systemd=Systemd({})).run()


def test_an_observer_that_cannot_begin_ends_it_before_it_is_ready(life: Life) -> None:
    closed = []

    class Refusing(Listener):
        def start(self) -> None:
            raise PreconditionError("the port is taken")

        def close(self) -> None:
            closed.append(True)

    life.observers = (Refusing(),)
    with pytest.raises(PreconditionError):
        Daemon(life.config, open_world=life.open_world, open_observers=life.open_observers, systemd=Systemd({})).run()
    assert closed == [True]
    assert life.lab.state.held == {}


def test_systemd_hears_that_it_is_alive_only_while_ticks_come_to_their_end(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.environment = {"WATCHDOG_USEC": "200000"}
    broken = threading.Event()
    real = Duties.tick

    def tick(duties: Duties) -> None:
        if broken.is_set():
            raise ZeroDivisionError
        real(duties)

    monkeypatch.setattr(Duties, "tick", tick)
    monkeypatch.setattr("vmsnap.daemon.service._SHORTEST_HEALTH", timedelta(0))
    monkeypatch.setattr("vmsnap.daemon.service._MISSED_TICKS", 1)
    life.settings("[daemon]\ntick = '1s'")

    def script(life: Life) -> None:
        life.wait_for(lambda: life.words.count("WATCHDOG=1") > 3)
        broken.set()
        time.sleep(1.2)
        heard = life.words.count("WATCHDOG=1")
        time.sleep(0.5)
        assert life.words.count("WATCHDOG=1") == heard

    life.run(script)
