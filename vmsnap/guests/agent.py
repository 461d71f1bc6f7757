"""Commands over the QEMU guest agent.

The protocol is that of QEMU's ``qga/qapi-schema.json``: ``guest-exec`` starts a program, ``guest-exec-status`` tells
whether it ended and hands over its output once. A process id that ``guest-exec`` gave is the only name of a program:
what ran before a capture is never asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from datetime import timedelta
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from vmsnap.errors import BugError, GuestCommandError, GuestUnreachableError
from vmsnap.guests.limits import ANSWER_CHARACTERS, OUTPUT_BYTES, deadline_error
from vmsnap.model.command import Command, CommandResult
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel

# A program's parent is the agent: it and all that it starts from then on go before the guest's other work.
_HURRY = Command(argv=("sh", "-c", 'renice -n -20 -p "$PPID"'))
_FIRST_WAIT = timedelta(milliseconds=20)
_LONGEST_WAIT = timedelta(milliseconds=250)
_REQUEST_TIMEOUT = timedelta(seconds=30)
_SILENCE = timedelta(seconds=60)
_INPUT_BYTES = 48 << 10  # less than the 64 KiB of a pipe
_CANNOT_RUN = 126
_NOT_FOUND = 127
_SIGNALLED = 128
_ALLOW = "allow guest-exec in the guest's /etc/qemu/qemu-ga.conf (allow-rpcs, block-rpcs), or give [control.ssh]"
# QEMU says the first up to 9.0, the second since.
_UNKNOWN_PID = re.compile(r"Invalid parameter 'pid'|PID -?[0-9]+ does not exist")
_log = logging.getLogger(__name__)


class Answer(BaseModel):
    """An answer of the agent. Unknown keys are newer agents' business; known ones must be what they should be."""

    model_config = ConfigDict(frozen=True, strict=True)


class _Refusal(Answer):
    error_class: str = Field(default="", alias="class")
    desc: str


class _Envelope(Answer):
    content: dict[str, object] | int | None = Field(default=None, alias="return")
    error: _Refusal | None = None


class _Thawed(RootModel[int]):
    """How many file systems were thawed."""

    model_config = ConfigDict(frozen=True, strict=True)


class _Started(Answer):
    pid: int


class _Status(Answer):
    exited: bool
    exitcode: int | None = None
    signal: int | None = None
    out_data: str = Field(default="", alias="out-data")
    err_data: str = Field(default="", alias="err-data")
    out_truncated: bool = Field(default=False, alias="out-truncated")
    err_truncated: bool = Field(default=False, alias="err-truncated")


_A = TypeVar("_A", bound=BaseModel)


class AgentControl:
    """Runs commands through a guest's agent (see ``vmsnap.ports.guest.GuestControl``).

    The agent runs as root; for another account the command runs under ``runuser``, which takes an argument list.
    ``urgent``: before its first command the agent thaws the file systems, which may have been frozen at the instant of
    the capture, and is told to go before the guest's other work, with all that it starts.
    """

    def __init__(
        self, channel: AgentChannel, *, clock: Clock, cancel: Cancel | None = None, urgent: bool = False
    ) -> None:
        self._channel = channel
        self._clock = clock
        self._cancel = cancel
        self._has_to_hurry = urgent

    @property
    def method(self) -> str:
        """Return ``agent``."""
        return "agent"

    def ping(self, *, timeout: timedelta) -> None:
        """Return where the agent answers. Raises GuestUnreachableError otherwise. May be repeated."""
        try:
            parse(Answer, self._ask("guest-ping", arguments={}, timeout=timeout))
        except GuestCommandError as error:
            raise GuestUnreachableError("the guest agent answers nonsense", details=error.brief) from error

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        """Run a command to its end. See ``GuestControl.run``. Time counts from when the agent has started the program.

        Whole streams travel in one answer, and libvirt breaks the line to an agent whose answer has more than 10 MiB:
        commands that print more than some megabytes do not belong here. Nor do commands with more than 48 KiB of
        input (BugError): where a program ends without reading more than a pipe holds, QEMU's agent runs in circles from
        then on and answers nobody (7.2, measured).

        Exit status 127 stands for a program that is not there and 126 for one that cannot be run, as in a shell.
        """
        if self._has_to_hurry:
            self._has_to_hurry = False
            self._thaw(timeout)
            self._hurry(timeout)
        return self._run(command, limit=command.timeout or timeout)

    def _thaw(self, timeout: timedelta) -> None:
        """Let file systems be written again, whoever froze them: an agent that did runs no program until they are."""
        try:
            thawed = parse(_Thawed, self._ask("guest-fsfreeze-thaw", arguments={}, timeout=timeout)).root
        except GuestCommandError as error:
            # It has no file systems that freeze, or may not thaw them; what is frozen then holds up a later command.
            _log.info("the guest agent does not thaw: %s", error.brief)
            return
        if thawed:
            _log.info("%d file systems were frozen at the capture; the clone's are thawed", thawed)

    def _hurry(self, timeout: timedelta) -> None:
        result = self._run(_HURRY, limit=timeout)
        if result.exit_status != 0:
            _log.info("the guest agent does not hurry: %s", result.error_text.strip())

    def _run(self, command: Command, *, limit: timedelta) -> CommandResult:
        if len(command.stdin) > _INPUT_BYTES:
            raise BugError(
                f"{len(command.stdin)} bytes of input for {command.argv[0]} are too many for the guest agent"
            )
        account = () if command.user in {None, "root"} else ("runuser", "-u", str(command.user), "--")
        argv = (*account, *command.argv)
        arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if command.stdin:
            arguments["input-data"] = base64.b64encode(command.stdin).decode("ascii")
        _log.debug("running %s in the guest", argv)
        try:
            started = parse(_Started, self._ask("guest-exec", arguments=arguments, timeout=_REQUEST_TIMEOUT))
        except GuestCommandError as error:
            # GLib's words for a program that the agent could not start; QEMU passes them on.
            words = f"{error.brief}\n{error.details}"
            if "Failed to execute child process" not in words:
                raise
            status = _NOT_FOUND if "No such file or directory" in words else _CANNOT_RUN
            return CommandResult(exit_status=status, stderr=words.encode())
        return self._wait(started.pid, command=command, limit=limit)

    def close(self) -> None:
        """Do nothing: the channel belongs to the hypervisor."""

    def _wait(self, pid: int, *, command: Command, limit: timedelta) -> CommandResult:
        pause = _FIRST_WAIT
        heard = self._clock.monotonic()
        end = heard + limit.total_seconds()
        while True:
            if self._cancel is not None:
                self._cancel.check()
            try:
                answer = self._ask("guest-exec-status", arguments={"pid": pid}, timeout=_REQUEST_TIMEOUT)
            except GuestUnreachableError:
                # Asking again is harmless, and an agent may be slow for a while in a guest that has just been resumed.
                if self._clock.monotonic() - heard > _SILENCE.total_seconds():
                    raise
            except GuestCommandError as error:
                if not _UNKNOWN_PID.search(f"{error.brief}\n{error.details}"):
                    raise
                raise GuestUnreachableError(
                    f"the guest agent no longer knows {command.argv[0]}, which it had started: it was restarted",
                    details=error.details or error.brief,
                ) from error
            else:
                status = parse(_Status, answer)
                if status.exited:
                    return _result(status)
                heard = self._clock.monotonic()
            if self._clock.monotonic() >= end:
                raise deadline_error(command, limit=limit)
            self._clock.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_WAIT)

    def _ask(self, request: str, *, arguments: dict[str, object], timeout: timedelta) -> str:
        text = self._channel.send(json.dumps({"execute": request, "arguments": arguments}), timeout=timeout)
        if len(text) > ANSWER_CHARACTERS:
            raise GuestCommandError(
                f"the guest agent's answer to {request} has {len(text)} characters; at most {ANSWER_CHARACTERS} are read"
            )
        return text


def parse(kind: type[_A], text: str) -> _A:
    """Read an answer of the agent. Raises GuestCommandError where it is a refusal or makes no sense."""
    try:
        answer = _Envelope.model_validate_json(text)
        if answer.error is not None:
            raise GuestCommandError(
                f"the guest agent refused: {answer.error.desc}", details=answer.error.error_class, remedy=_ALLOW
            )
        return kind.model_validate(answer.content)
    except ValidationError as error:
        raise GuestCommandError(
            "the guest agent's answer makes no sense",
            details=f"{error.error_count()} faults, the first: {error.errors(include_input=False)[0]['msg']}",
            remedy="update or restart qemu-guest-agent in the guest, or give [control.ssh] in the policy",
        ) from error


def _result(status: _Status) -> CommandResult:
    if status.exitcode is not None:
        exit_status = status.exitcode
    elif status.signal is not None:
        exit_status = _SIGNALLED + status.signal
    else:
        raise GuestCommandError("the guest agent says that a program ended, but not how")
    stdout, stderr = decode(status.out_data), decode(status.err_data)
    return CommandResult(
        exit_status=exit_status,
        stdout=stdout[:OUTPUT_BYTES],
        stderr=stderr[:OUTPUT_BYTES],
        truncated=status.out_truncated or status.err_truncated or max(len(stdout), len(stderr)) > OUTPUT_BYTES,
    )


def decode(text: str) -> bytes:
    """Read base64 in an answer of the agent. Raises GuestCommandError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise GuestCommandError("the guest agent sent output that is not base64") from error
