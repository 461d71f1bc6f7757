"""Control over the guest agent: what it sends, and what it does with an agent that misbehaves."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import BugError, CancelledError, DeadlineError, GuestCommandError, GuestUnreachableError, VmsnapError
from vmsnap.guests.access import Access
from vmsnap.guests.limits import ANSWER_CHARACTERS, OUTPUT_BYTES
from vmsnap.model.command import Command, CommandResult
from vmsnap.ports.guest import GuestControl
from vmsnap.testing.local_agent import LocalAgent

LIMIT = timedelta(seconds=60)
PID = '{"return": {"pid": 4711}}'
RUNS = '{"return": {"exited": false}}'
ENDED = '{"return": {"exited": true, "exitcode": 0}}'
THAWED = '{"return": 2}'
Say = str | VmsnapError


class Clock:
    """A clock on which waiting takes no time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waits: list[float] = []

    def now(self) -> datetime:
        return datetime(2026, 11, 21, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, duration: timedelta) -> None:
        self.waits.append(duration.total_seconds())
        self.seconds += duration.total_seconds()


class Channel:
    """Answers from a list; the last one again and again. An answer takes ``seconds_each`` of the clock."""

    def __init__(self, *answers: Say, clock: Clock | None = None, seconds_each: float = 0.0) -> None:
        self.answers = list(answers)
        self.clock = clock
        self.seconds_each = seconds_each
        self.requests: list[dict[str, object]] = []
        self.timeouts: list[timedelta] = []

    def send(self, request: str, *, timeout: timedelta) -> str:
        self.requests.append(json.loads(request))
        self.timeouts.append(timeout)
        if self.clock is not None:
            self.clock.seconds += self.seconds_each
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, VmsnapError):
            raise answer
        return answer


def control(channel: Channel | LocalAgent, *, clock: Clock | None = None) -> GuestControl:
    return Access(clock=clock or Clock()).agent(channel)


def run(*answers: Say, command: Command | None = None) -> CommandResult:
    return control(Channel(*answers)).run(command or Command(argv=("true",)), timeout=LIMIT)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_command_becomes_a_guest_exec_with_an_argument_list() -> None:
    channel = Channel(PID, ENDED)
    control(channel).run(Command(argv=("cp", "a b", "$c"), stdin=b"\0\xff"), timeout=LIMIT)
    assert channel.requests == [
        {
            "execute": "guest-exec",
            "arguments": {"path": "cp", "arg": ["a b", "$c"], "capture-output": True, "input-data": encoded(b"\0\xff")},
        },
        {"execute": "guest-exec-status", "arguments": {"pid": 4711}},
    ]


@pytest.mark.parametrize(
    ("user", "argv"),
    [
        (None, ["id"]),
        ("root", ["id"]),
        ("postgres", ["runuser", "-u", "postgres", "--", "id"]),
        ("-x; id", ["runuser", "-u", "-x; id", "--", "id"]),
    ],
)
def test_another_account_goes_through_runuser(user: str | None, argv: list[str]) -> None:
    channel = Channel(PID, ENDED)
    control(channel).run(Command(argv=("id",), user=user), timeout=LIMIT)
    sent = channel.requests[0]["arguments"]
    assert isinstance(sent, dict)
    assert [sent["path"], *sent["arg"]] == argv


def test_an_urgent_agent_is_hurried_once() -> None:
    channel = Channel(THAWED, PID, ENDED, PID, ENDED, PID, ENDED)
    urgent = Access(clock=Clock()).agent(channel, urgent=True)
    for _ in range(2):
        urgent.run(Command(argv=("id",), user="postgres"), timeout=LIMIT)
    started = [
        asked for request in channel.requests if isinstance(asked := request["arguments"], dict) and "path" in asked
    ]
    assert [arguments["path"] for arguments in started] == ["sh", "runuser", "runuser"]
    assert started[0]["arg"] == ["-c", 'renice -n -20 -p "$PPID"']
    # While its file systems are frozen, the agent starts no program.
    assert [request["execute"] for request in channel.requests].index("guest-fsfreeze-thaw") == 0
    assert channel.requests.count({"execute": "guest-fsfreeze-thaw", "arguments": {}}) == 1


@pytest.mark.parametrize(
    "answer", ['{"error": {"class": "GenericError", "desc": "not supported"}}', '{"return": "no"}']
)
def test_an_agent_that_cannot_thaw_works_all_the_same(answer: str) -> None:
    urgent = Access(clock=Clock()).agent(Channel(answer, PID, ENDED, PID, ENDED), urgent=True)
    assert urgent.run(Command(argv=("id",)), timeout=LIMIT).exit_status == 0


def test_an_agent_of_a_guest_is_not_told_to_thaw() -> None:
    channel = Channel(PID, ENDED)
    control(channel).run(Command(argv=("id",)), timeout=LIMIT)
    assert [request["execute"] for request in channel.requests] == ["guest-exec", "guest-exec-status"]


def test_an_agent_that_cannot_hurry_works_all_the_same() -> None:
    failed = json.dumps({"return": {"exited": True, "exitcode": 1}})
    urgent = Access(clock=Clock()).agent(Channel(THAWED, PID, failed, PID, ENDED), urgent=True)
    assert urgent.run(Command(argv=("id",)), timeout=LIMIT).exit_status == 0


def test_an_agent_that_refuses_to_hurry_refuses_the_command() -> None:
    refusal = json.dumps({"error": {"class": "GenericError", "desc": "guest-exec is blocked"}})
    urgent = Access(clock=Clock()).agent(Channel(refusal), urgent=True)
    with pytest.raises(GuestCommandError, match="blocked"):
        urgent.run(Command(argv=("id",)), timeout=LIMIT)


def test_outputs_come_back() -> None:
    answer = {"exited": True, "exitcode": 3, "out-data": encoded(b"o\0"), "err-data": encoded(b"e"), "new-key": 1}
    assert run(PID, RUNS, json.dumps({"return": answer})) == CommandResult(exit_status=3, stdout=b"o\0", stderr=b"e")


def test_a_signal_is_128_and_its_number() -> None:
    assert run(PID, '{"return": {"exited": true, "signal": 15}}').exit_status == 143


@pytest.mark.parametrize("key", ["out-truncated", "err-truncated"])
def test_output_that_the_agent_cut_is_marked(key: str) -> None:
    assert run(PID, json.dumps({"return": {"exited": True, "exitcode": 0, key: True}})).truncated


def test_output_beyond_the_limit_is_cut() -> None:
    answer = {"exited": True, "exitcode": 0, "out-data": encoded(bytes(OUTPUT_BYTES + 1))}
    result = run(PID, json.dumps({"return": answer}))
    assert (len(result.stdout), result.truncated) == (OUTPUT_BYTES, True)


def test_input_that_could_hang_the_agent_is_never_sent() -> None:
    channel = Channel(PID, ENDED)
    with pytest.raises(BugError):
        control(channel).run(Command(argv=("cat",), stdin=bytes((48 << 10) + 1)), timeout=LIMIT)
    assert channel.requests == []


def test_waits_grow_to_a_quarter_of_a_second() -> None:
    clock = Clock()
    control(Channel(PID, *[RUNS] * 20, ENDED), clock=clock).run(Command(argv=("true",)), timeout=LIMIT)
    assert clock.waits[0] == pytest.approx(0.02)
    assert clock.waits == sorted(clock.waits)
    assert clock.waits[-1] == pytest.approx(0.25)


def test_a_command_that_does_not_end_is_given_up() -> None:
    clock = Clock()
    with pytest.raises(DeadlineError, match="sleep did not end in the guest within 60 s"):
        control(Channel(PID, RUNS), clock=clock).run(Command(argv=("sleep", "99")), timeout=LIMIT)
    assert 60 <= clock.seconds < 61


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "rubbish",
        "[]",
        "3",
        "null",
        "{}",
        '{"return": null}',
        '{"return": []}',
        '{"return": {"pid": "4711"}}',
        '{"return": {"pid": true}}',
        '{"return": {"pid": 1.5}}',
        '{"return": {}}',
        '{"error": 3}',
        "{" * 100_000,
        '{"return": ' + "[" * 100_000,
        "\ud800",
    ],
)
def test_rubbish_instead_of_a_process_id_is_refused(answer: str) -> None:
    with pytest.raises(GuestCommandError):
        run(answer)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"exited": "yes"},
        {"exited": 1},
        {"exited": True},
        {"exited": True, "exitcode": "0"},
        {"exited": True, "exitcode": None},
        {"exited": True, "exitcode": 0, "out-data": "no base64!"},
        {"exited": True, "exitcode": 0, "out-data": "YQ"},
        {"exited": True, "exitcode": 0, "out-data": 5},
        {"exited": True, "exitcode": 0, "err-data": "\u00e4"},
        {"exited": True, "exitcode": 0, "out-truncated": "no"},
    ],
)
def test_rubbish_instead_of_a_status_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(GuestCommandError):
        run(PID, json.dumps({"return": content}))


@given(st.text(max_size=200))
def test_any_answer_is_used_or_refused(text: str) -> None:
    with suppress(GuestCommandError):
        run(text)
    with suppress(GuestCommandError):
        run(PID, text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["exited", "exitcode", "signal", "out-data", "pid", "x"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_is_used_or_refused(value: object) -> None:
    for answers in ((json.dumps({"return": value}),), (PID, json.dumps({"return": value}))):
        with suppress(GuestCommandError, DeadlineError):
            run(*answers)


def test_an_answer_of_a_hundred_megabytes_is_not_even_parsed() -> None:
    with pytest.raises(GuestCommandError, match="at most"):
        run(PID, " " * 100_000_000)
    assert ANSWER_CHARACTERS < 100_000_000


def test_an_agent_that_refuses_is_quoted() -> None:
    answer = {"error": {"class": "CommandNotFound", "desc": "Command guest-exec has been disabled"}}
    with pytest.raises(GuestCommandError, match="has been disabled") as caught:
        run(json.dumps(answer))
    assert "qemu-ga.conf" in str(caught.value.remedy)


def test_a_program_that_cannot_start_is_a_status_as_in_a_shell() -> None:
    # The words of libvirt 9.0, QEMU 7.2 and GLib 2.74.
    words = (
        "internal error: unable to execute QEMU agent command 'guest-exec': Guest agent command failed, "
        "reason: Failed to execute child process \u201cfoo\u201d "
    )
    missing = run(GuestCommandError(f"{words}(No such file or directory)"))
    denied = run(GuestCommandError("refused", details=f"{words}(Permission denied)"))
    assert (missing.exit_status, denied.exit_status) == (127, 126)
    assert b"foo" in missing.stderr


def test_other_refusals_are_errors() -> None:
    with pytest.raises(GuestCommandError, match="no room"):
        run(GuestCommandError("no room"))
    with pytest.raises(GuestCommandError, match="no room"):
        run(PID, GuestCommandError("no room for rapid things"))


@pytest.mark.parametrize("words", ["Invalid parameter 'pid'", "PID 4711 does not exist"])
def test_an_agent_that_forgot_the_command_broke_the_line(words: str) -> None:
    with pytest.raises(GuestUnreachableError, match="restarted"):
        run(PID, RUNS, GuestCommandError(f"internal error: unable to execute QEMU agent command: {words}"))


def test_an_agent_that_is_silent_for_a_while_is_asked_again() -> None:
    clock = Clock()
    silence = GuestUnreachableError("no answer")
    channel = Channel(PID, silence, RUNS, silence, ENDED, clock=clock, seconds_each=14)
    assert control(channel, clock=clock).run(Command(argv=("true",)), timeout=timedelta(minutes=5)).exit_status == 0


def test_an_agent_that_stays_silent_is_unreachable() -> None:
    clock = Clock()
    channel = Channel(PID, RUNS, GuestUnreachableError("no answer"), clock=clock, seconds_each=14)
    with pytest.raises(GuestUnreachableError):
        control(channel, clock=clock).run(Command(argv=("true",)), timeout=timedelta(hours=1))
    assert clock.seconds < 120


def test_a_command_is_never_started_twice() -> None:
    channel = Channel(GuestUnreachableError("no answer"))
    with pytest.raises(GuestUnreachableError):
        control(channel).run(Command(argv=("true",)), timeout=LIMIT)
    assert len(channel.requests) == 1


def test_a_cancelled_run_stops_waiting() -> None:
    class Cancel:
        def is_set(self) -> bool:
            return True

        def check(self) -> None:
            raise CancelledError("a signal asked the run to stop")

    waiting = Access(clock=Clock(), cancel=Cancel()).agent(Channel(PID, RUNS))
    with pytest.raises(CancelledError):
        waiting.run(Command(argv=("sleep", "99")), timeout=LIMIT)


def test_the_real_thing_forgets_as_well() -> None:
    agent = LocalAgent()

    class Restart(Clock):
        def sleep(self, duration: timedelta) -> None:
            agent.restart()

    with pytest.raises(GuestUnreachableError, match="restarted"):
        control(agent, clock=Restart()).run(Command(argv=("sleep", "60")), timeout=LIMIT)


@pytest.mark.parametrize("answer", ["rubbish", "{}", '{"return": 3}', '{"error": {"desc": "no"}}'])
def test_an_agent_that_answers_a_ping_with_rubbish_is_unreachable(answer: str) -> None:
    with pytest.raises(GuestUnreachableError):
        control(Channel(answer)).ping(timeout=LIMIT)


def test_ping_keeps_its_time_limit() -> None:
    channel = Channel('{"return": {}}')
    control(channel).ping(timeout=timedelta(seconds=3))
    assert channel.timeouts == [timedelta(seconds=3)]


@pytest.mark.parametrize("spoil", [lambda text: text, lambda text: text[:-3]])
def test_no_secret_is_logged_or_told(caplog: pytest.LogCaptureFixture, spoil: Callable[[str], str]) -> None:
    caplog.set_level(logging.DEBUG)
    secret = b"correct horse battery staple"
    answer = {"exited": True, "exitcode": 1, "out-data": spoil(encoded(secret)), "err-data": encoded(secret)}
    told = ""
    try:
        result = run(PID, json.dumps({"return": answer}), command=Command(argv=("cat",), stdin=secret, sensitive=True))
    except GuestCommandError as error:
        told = f"{error} {error.details} {error.remedy}"
    else:
        told = repr(result)
    for text in (secret.decode(), encoded(secret)[:20]):
        assert text not in caplog.text
        assert text not in told
