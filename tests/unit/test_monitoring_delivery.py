"""Notifications and pings to a real HTTP server: they arrive, and nothing they meet harms or holds up anybody."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from tests.unit.listener import Listener, listening, threads_ended
from vmsnap.model.alarms import Alarm, AlarmKind, Notice, Raised
from vmsnap.model.guest import Severity
from vmsnap.monitoring.channels import Channels, Message, Tone, findings_of
from vmsnap.monitoring.ping import DeadManPing, ping_findings
from vmsnap.monitoring.wording import MOST_SHOWN, message_of

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
MESSAGE = Message(title="vmsnap on host: db: backup failed", body="no room\n  What to do: make some", tone=Tone.BAD)
SECRETS = ("t0ken", "passw0rd")
SECOND = timedelta(seconds=1)


@pytest.fixture(autouse=True)
def _no_thread_goes_on() -> Iterator[None]:
    with threads_ended():
        yield


@pytest.fixture
def listener(_no_thread_goes_on: None) -> Iterator[Listener]:
    with listening() as heard:
        yield heard


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_message_arrives_as_it_was_written(listener: Listener) -> None:
    channels = Channels([listener.url()], timeout=5 * SECOND)
    assert not channels.is_empty
    assert channels.send(MESSAGE)
    (message,) = listener.messages
    assert (message["title"], message["message"], message["type"]) == (MESSAGE.title, MESSAGE.body, "failure")


def test_one_channel_that_takes_it_is_enough_and_the_other_is_named_without_its_secret(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"json://user:passw0rd@127.0.0.1:{free_port()}/t0ken"
    assert Channels([dead, listener.url()], timeout=5 * SECOND).send(MESSAGE)
    assert "channel 1 (json) took no message" in caplog.text
    assert "channel 2" not in caplog.text


def test_nobody_took_it(listener: Listener) -> None:
    listener.status = 500
    assert not Channels([listener.url()], timeout=5 * SECOND).send(MESSAGE)
    nobody = Channels(["nonsense"], timeout=SECOND)
    assert nobody.is_empty
    assert not nobody.send(MESSAGE)


def test_one_that_hangs_holds_nobody_up_and_is_passed_over_until_it_is_done(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    listener.hangs.set()
    with listening() as other:
        # rto: apprise itself would give up after 4 seconds.
        channels = Channels([listener.url("/hook/t0ken?rto=30"), other.url()], timeout=3 * SECOND)
        began = time.monotonic()
        assert channels.send(MESSAGE)
        assert channels.send(MESSAGE)
        assert time.monotonic() - began < 10
        assert (len(listener.messages), len(other.messages)) == (1, 2)
    assert "channel 1 (json) hangs" in caplog.text
    assert "still hangs in an earlier message" in caplog.text
    listener.hangs.clear()
    listener.freed.set()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("vmsnap-channel 1") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert channels.send(MESSAGE)
    assert len(listener.messages) == 2


def test_no_log_line_at_any_level_holds_a_secret(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    dead = f"127.0.0.1:{free_port()}"
    with caplog.at_level(logging.DEBUG):
        urls = [listener.url(), f"json://user:passw0rd@{dead}/t0ken", "slack://t0ken", "nonsense:/t0ken", "t0ken", ""]
        channels = Channels(urls, timeout=5 * SECOND)
        channels.send(MESSAGE)
        listener.status = 403
        channels.send(MESSAGE)
        findings = findings_of(urls)
        for url in (
            listener.ping_url(),
            f"http://{dead}/t0ken",
            "t0ken",
            "ftp://t0ken/",
            "http://t0ken:99999999/",
            "http://[",
        ):
            DeadManPing(url, method="GET", timeout=5 * SECOND).send()
            findings += ping_findings(url)
    said = caplog.text + repr(findings) + repr([record.args for record in caplog.records])
    assert not [secret for secret in SECRETS if secret in said]
    assert said.count("channel 3 (slack) is no URL") == 2


@pytest.mark.parametrize(
    ("url", "severity"),
    [
        ("json://192.0.2.1/x", Severity.OK),
        ("mailto://user:secret@example.com", Severity.OK),
        ("ntfy://topic", Severity.OK),
        ("slack://", Severity.WARNING),
        ("hamster://x", Severity.WARNING),
        ("https://", Severity.WARNING),
        ("x", Severity.WARNING),
    ],
)
def test_doctor_knows_a_url_by_its_form(url: str, severity: Severity) -> None:
    (finding,) = findings_of([url])
    assert finding.severity is severity
    assert severity is Severity.OK or finding.remedy


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_ping_arrives(listener: Listener, method: str) -> None:
    DeadManPing(listener.ping_url(), method=method, timeout=5 * SECOND).send()
    assert listener.pings == [f"{method} /ping/t0ken"]


def test_a_ping_that_hangs_or_fails_holds_nobody_up(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    ping = DeadManPing(listener.ping_url(), method="GET", timeout=SECOND / 2)
    listener.hangs.set()
    began = time.monotonic()
    ping.send()
    ping.send()
    assert time.monotonic() - began < 3
    listener.freed.set()
    DeadManPing(f"http://127.0.0.1:{free_port()}/", method="GET", timeout=SECOND).send()
    assert "was not taken (URLError)" in caplog.text


def test_a_ping_that_is_no_url_is_said_so() -> None:
    assert [finding.severity for finding in ping_findings("https://x.example/y")] == [Severity.OK]
    assert [finding.severity for finding in ping_findings("x.example/y")] == [Severity.WARNING]
    assert ping_findings(None) == ()


# What a message says


def raised(guest: str, kind: AlarmKind = AlarmKind.FAILURE, text: str = "no room") -> Raised:
    return Raised(alarm=Alarm(guest=guest, kind=kind, text=text, remedy="make some"), since=NOW)


def test_the_worst_is_in_the_title_and_everything_says_what_to_do() -> None:
    message = message_of(Notice(begun=(raised("a"), raised("b", AlarmKind.BREACH, "a frame"))), host="h1")
    assert message.title == "vmsnap on h1: b: ISOLATION BREACH, and 1 more"
    assert message.body.splitlines() == [
        "b: ISOLATION BREACH: a frame",
        "  What to do: make some",
        "a: backup failed: no room",
        "  What to do: make some",
    ]
    assert message.tone is Tone.BAD


def test_a_recovery_and_a_reminder_sound_like_one() -> None:
    over = message_of(Notice(over=(raised("a"),)), host="h1")
    assert (over.title, over.tone) == ("vmsnap on h1: a: recovered", Tone.GOOD)
    assert over.body == "Over: a: backup failed (since 2026-11-21 12:00Z)"
    still = message_of(Notice(going_on=(raised("a"),)), host="h1")
    assert (still.title, still.tone) == ("vmsnap on h1: still: a: backup failed", Tone.WORRYING)
    assert "(since 2026-11-21 12:00Z)" in still.body
    assert message_of(Notice(begun=(raised(""),)), host="h1").title == "vmsnap on h1: this host: backup failed"


def test_a_message_about_many_guests_stays_short_and_control_characters_stay_out() -> None:
    many = tuple(raised(f"vm{number:03}\x1b[1m\n", text="x" * 10_000 + "\nnext\tline") for number in range(500))
    message = message_of(Notice(begun=many, over=many), host="h1")
    assert "and 480 more" in message.body
    assert message.title.endswith("and 499 more")
    assert len(message.body.splitlines()) < 3 * MOST_SHOWN + 3
    assert max(len(line) for line in message.body.splitlines()) < 600
    assert not [character for character in message.title + message.body if character < " " and character != "\n"]
