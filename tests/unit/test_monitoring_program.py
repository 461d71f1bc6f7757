"""The real program, as a process, on a host without a hypervisor: what it tells, shows and pings, and what it keeps to itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.unit.listener import Listener, listening
from vmsnap.config.credentials import addressees_of
from vmsnap.config.settings import NotificationSettings, load_settings
from vmsnap.errors import ConfigError
from vmsnap.model.alarms import AlarmKind
from vmsnap.oversight import findings_of
from vmsnap.state.alarms import FileAlarmBook
from vmsnap.state.attempts import FileAttemptBook

SECRETS = ("t0ken", "passw0rd")
NO_HYPERVISOR = 3
A_WHILE = timedelta(minutes=6)
"""After that an attempt that has no end counts as one whose process is gone."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Installation:
    """A configuration with one guest, which cannot be backed up here."""

    folder: Path
    listener: Listener
    port: int

    @property
    def config(self) -> Path:
        return self.folder / "vmsnap.toml"

    @property
    def textfile(self) -> Path:
        return self.folder / "vmsnap.prom"

    @property
    def credential(self) -> Path:
        return self.folder / "notifications.toml"

    def write(self, *, credential: str | None = None) -> None:
        (self.folder / "policies").mkdir(exist_ok=True)
        (self.folder / "policies" / "db.toml").write_text("")
        (self.folder / "store").mkdir(exist_ok=True)
        self.credential.write_text(
            f'urls = ["{self.listener.url()}"]\ndead_man_url = "{self.listener.ping_url()}"\n', encoding="utf-8"
        )
        self.credential.chmod(0o600)
        self.config.write_text(
            f"""
            [store]
            path = "{self.folder}/store"
            allow_copies = true
            [state]
            path = "{self.folder}/state"
            [runtime]
            path = "{self.folder}/run"
            [libvirt]
            uri = "qemu+unix:///system?socket={self.folder}/no-socket"
            [daemon]
            tick = "1s"
            [metrics]
            listen = "127.0.0.1:{self.port}"
            textfile = "{self.textfile}"
            [notifications]
            credential = "{credential or self.credential}"
            """,
            encoding="utf-8",
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vmsnap", "--debug", *arguments, "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | environment,
        )


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Installation]:
    with listening() as listener:
        installation = Installation(tmp_path, listener, free_port())
        installation.write()
        yield installation


def until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def samples(text: str, name: str) -> dict[str, float]:
    found = (family for family in parse(text) if family.name == name)
    return {item.labels.get("guest", ""): item.value for family in found for item in family.samples}


def test_a_timer_alone_tells_shows_and_pings(here: Installation) -> None:
    first = here.run("run", "--due")
    assert first.returncode == NO_HYPERVISOR, first.stderr
    assert [message["title"].partition(": ")[2] for message in here.listener.messages] == ["db: backup failed"]
    assert len(here.listener.pings) == 1  # a failure that somebody was told of
    text = here.textfile.read_text(encoding="utf-8")
    assert samples(text, "vmsnap_guest_failed_attempts") == {"db": 1}
    assert samples(text, "vmsnap_alarms") == {"": 1}
    second = here.run("run", "--due")
    assert second.returncode == 0, second.stderr  # not due: the failure puts it off
    assert (len(here.listener.messages), len(here.listener.pings)) == (1, 2)
    said = first.stderr + first.stdout + second.stderr + second.stdout
    assert not [secret for secret in SECRETS if secret in said]
    assert here.run("run", "--due", "--dry-run").returncode == 0
    assert (len(here.listener.messages), len(here.listener.pings)) == (1, 2)


def test_a_backup_by_hand_tells_too_and_does_not_ping(here: Installation) -> None:
    assert here.run("backup", "db").returncode == NO_HYPERVISOR
    assert here.listener.pings == []
    assert here.textfile.exists()


def test_metrics_are_printed_and_written_and_nobody_is_told(here: Installation) -> None:
    printed = here.run("metrics")
    assert printed.returncode == 0, printed.stderr
    assert samples(printed.stdout, "vmsnap_guest_enabled") == {"db": 1}
    path = here.folder / "other.prom"
    assert here.run("metrics", "--textfile", str(path)).stdout == ""
    assert samples(path.read_text(encoding="utf-8"), "vmsnap_guest_enabled") == {"db": 1}
    document = json.loads(here.run("metrics", "--json").stdout)
    assert {"name": "vmsnap_problems", "text": ANY_TEXT, "samples": [{"labels": {}, "value": 0}]} in document["metrics"]
    assert here.listener.requests == []
    assert not (here.folder / "state" / "alarms.json").exists()


class _AnyText:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    __hash__ = None  # type: ignore[assignment]


ANY_TEXT = _AnyText()


def test_the_daemon_answers_prometheus_tells_once_and_ends_in_order(here: Installation) -> None:
    command = [sys.executable, "-m", "vmsnap", "--debug", "daemon", "--config", str(here.config)]
    path = here.folder / "log"
    for _ in range(2):  # a restart repeats nothing
        before = len(here.listener.pings)
        with path.open("a") as log, subprocess.Popen(command, stderr=log, stdout=log) as daemon:
            try:
                until(lambda: len(here.listener.pings) > before + 2)  # noqa: B023 - used at once
                with urlopen(f"http://127.0.0.1:{here.port}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
                daemon.send_signal(signal.SIGTERM)
                assert daemon.wait(60) == 0
            finally:
                daemon.kill()
        assert samples(text, "vmsnap_guest_failed_attempts") == {"db": 1}
        # Without a hypervisor the daemon cannot reconcile either; one of both may wait for its turn to be told.
        assert samples(text, "vmsnap_alarms_untold")[""] <= 1
    bodies = [message["message"] for message in here.listener.messages]
    assert 1 <= len(bodies) <= 2
    raised = {item.alarm.kind: item for item in FileAlarmBook(here.folder / "state").load().raised}
    assert raised.keys() == {AlarmKind.FAILURE, AlarmKind.PROBLEM}
    assert all(item.over is None for item in raised.values()), "a restart ends nothing"
    for kind, text in (
        (AlarmKind.FAILURE, "db: backup failed"),
        (AlarmKind.PROBLEM, "this host: cannot be looked after"),
    ):
        assert sum(text in body for body in bodies) == (raised[kind].told is not None)
    said = path.read_text(encoding="utf-8")
    assert not [secret for secret in SECRETS if secret in said]


def test_killed_at_any_moment_it_does_not_tell_twice_at_once_and_remembers_what_it_owes(here: Installation) -> None:
    command = [sys.executable, "-m", "vmsnap", "run", "--due", "--config", str(here.config)]
    for delay in (0.6, 0.8, 1.0, 1.2, 1.4):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)
            process.kill()
    here.run("run", "--due")
    book = FileAttemptBook(here.folder / "state")
    if book.failures("db")[-1].ended is None:
        # Killed in mid-attempt: nobody can tell yet that this is over, so time goes on.
        book.replace("db", failures=[replace(item, began=item.began - A_WHILE) for item in book.failures("db")])
        here.run("run", "--due")
    ledger = FileAlarmBook(here.folder / "state").load()
    assert [item.alarm.kind for item in ledger.raised] == [AlarmKind.FAILURE]
    # Killed between telling and writing that down, it owes it still, and waits.
    assert len(here.listener.messages) == 1 or (not here.listener.messages and ledger.raised[0].told is None)
    assert ledger.raised[0].told is not None or here.listener.pings == []


# The credential


def test_a_unit_is_handed_its_credential(here: Installation) -> None:
    here.write(credential="notifications")
    handed = here.folder / "credentials"
    handed.mkdir()
    (handed / "notifications").write_bytes(here.credential.read_bytes())
    assert here.run("run", "--due").returncode == NO_HYPERVISOR
    assert here.listener.requests == []
    assert here.run("run", "--due", CREDENTIALS_DIRECTORY=str(handed)).returncode == 0
    assert len(here.listener.messages) == 1


def settings(**keys: object) -> NotificationSettings:
    return NotificationSettings.model_validate(keys)


def test_a_file_that_others_may_read_is_refused_and_its_content_not_shown(here: Installation) -> None:
    for mode in (0o640, 0o604, 0o660):
        here.credential.chmod(mode)
        with pytest.raises(ConfigError, match="others may read it") as caught:
            addressees_of(settings(credential=str(here.credential)))
        assert "chmod 600" in str(caught.value.remedy)
    here.credential.chmod(0o600)
    found = addressees_of(settings(credential=str(here.credential), urls=("json://192.0.2.1",)))
    assert found.urls == ("json://192.0.2.1", here.listener.url())
    assert found.dead_man_url == here.listener.ping_url()
    assert "t0ken" not in repr(found)


@pytest.mark.parametrize(
    "content", ['urls = "json://t0ken"', 'urls = ["json://t0ken', 'url = ["json://t0ken"]', "urls = [t0ken]", "\xff"]
)
def test_a_credential_that_is_wrong_is_said_so_without_its_secrets(here: Installation, content: str) -> None:
    here.credential.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        addressees_of(settings(credential=str(here.credential)))
    error = caught.value
    assert error.remedy
    assert "json://t0ken" not in f"{error.brief}{error.details}"


def test_a_credential_that_is_not_there_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        addressees_of(settings(credential=str(tmp_path / "none.toml")))
    with pytest.raises(ConfigError, match="neither an absolute path nor a name"):
        addressees_of(settings(credential="a/b"))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match="was given no systemd credential 'x'") as caught:
        addressees_of(settings(credential="x"))
    assert "LoadCredential=x:" in str(caught.value.remedy)


def test_doctor_and_policy_check_warn_of_what_is_wrong_with_notifications(here: Installation) -> None:
    text = here.config.read_text(encoding="utf-8")
    urls = '[notifications]\nurls = ["slack://t0ken", "json://192.0.2.1/t0ken"]\ndead_man_url = "t0ken"'
    here.config.write_text(
        text.replace("[notifications]", urls).replace(f"127.0.0.1:{here.port}", f"0.0.0.0:{here.port}"),
        encoding="utf-8",
    )
    here.config.chmod(0o644)
    checked = here.run("policy", "check")
    document = here.run("policy", "check", "--json").stdout
    assert checked.returncode == 0
    for part in (
        "channel 1 (slack) is no URL that apprise can use",
        "dead_man_url is no URL that can be pinged",
        "is no loopback address",
        "others may read",
    ):
        assert part in checked.stdout
        assert part in document
    assert "channel 2" not in checked.stdout
    assert "t0ken" not in checked.stdout + checked.stderr
    assert "channel 1 (slack)" in here.run("doctor").stdout
    here.config.chmod(0o600)
    found = findings_of(load_settings(here.config), file=here.config)
    assert not [finding for finding in found if "others may read" in finding.message]
    assert here.listener.requests == []
