from __future__ import annotations

import base64
import json
from datetime import timedelta

import pytest

from vmsnap.errors import GuestCommandError, GuestUnreachableError, VmsnapError
from vmsnap.guests.agentfile import read_file

SECOND = timedelta(seconds=1)
CONTENT = b"0b9d2fd2-6d0e-4f0c-8a51-0d2b6c1f3a77\n"


class Agent:
    """An agent with one file. ``answers`` replaces the answer to a request by a text or an error."""

    def __init__(self, **answers: str | VmsnapError) -> None:
        self._answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.requests: list[tuple[str, dict[str, object]]] = []

    def send(self, request: str, *, timeout: timedelta) -> str:
        assert timeout == SECOND
        asked = json.loads(request)
        self.requests.append((asked["execute"], asked["arguments"]))
        answer = self._answers.get(asked["execute"])
        if isinstance(answer, VmsnapError):
            raise answer
        usual = {
            "guest-file-open": {"return": 1000},
            "guest-file-read": {"return": {"count": 37, "buf-b64": base64.b64encode(CONTENT).decode(), "eof": True}},
            "guest-file-close": {"return": {}},
        }
        return answer or json.dumps(usual[asked["execute"]])


def test_a_file_is_opened_read_and_closed_and_no_program_is_run() -> None:
    agent = Agent()
    assert read_file(agent, path="/proc/sys/kernel/random/boot_id", timeout=SECOND) == CONTENT
    assert agent.requests == [
        ("guest-file-open", {"path": "/proc/sys/kernel/random/boot_id", "mode": "r"}),
        ("guest-file-read", {"handle": 1000, "count": 4096}),
        ("guest-file-close", {"handle": 1000}),
    ]


def test_a_file_that_is_not_there_is_none() -> None:
    missing = GuestCommandError("the agent refused", details="failed to open file '/run/x': No such file or directory")
    assert read_file(Agent(guest_file_open=missing), path="/run/x", timeout=SECOND) is None
    refused = '{"error": {"class": "GenericError", "desc": "failed to open file: No such file or directory"}}'
    assert read_file(Agent(guest_file_open=refused), path="/run/x", timeout=SECOND) is None


@pytest.mark.parametrize(
    "error", [GuestCommandError("Command guest-file-open has been disabled"), GuestUnreachableError("?")]
)
def test_a_refusal_or_silence_is_raised(error: VmsnapError) -> None:
    with pytest.raises(type(error)):
        read_file(Agent(guest_file_open=error), path="/run/x", timeout=SECOND)


def test_a_file_that_cannot_be_read_is_closed_all_the_same() -> None:
    agent = Agent(guest_file_read=GuestCommandError("no"))
    with pytest.raises(GuestCommandError):
        read_file(agent, path="/run/x", timeout=SECOND)
    assert agent.requests[-1][0] == "guest-file-close"


@pytest.mark.parametrize(
    "answer", ["", "[]", "1", '{"return": "handle"}', '{"return": {}}', '{"return": null}', "{}", '{"return": true}']
)
def test_nonsense_instead_of_a_handle_is_refused(answer: str) -> None:
    with pytest.raises(GuestCommandError):
        read_file(Agent(guest_file_open=answer or "nonsense"), path="/run/x", timeout=SECOND)


@pytest.mark.parametrize(
    "answer", ["x", '{"return": {}}', '{"return": {"buf-b64": 7}}', '{"return": {"buf-b64": "?"}}']
)
def test_nonsense_instead_of_content_is_refused(answer: str) -> None:
    with pytest.raises(GuestCommandError):
        read_file(Agent(guest_file_read=answer), path="/run/x", timeout=SECOND)
