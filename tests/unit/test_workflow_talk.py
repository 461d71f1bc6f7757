from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from vmsnap.errors import CancelledError, GuestCommandError, GuestUnreachableError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.testing.faults import FaultCancel
from vmsnap.testing.world import FakeClock
from vmsnap.workflow.talk import converse, wait_until_answers

MINUTE = timedelta(minutes=1)


class Scripted:
    """A control that does what a test says."""

    method = "agent"

    def __init__(self, answer: Callable[[Command], CommandResult]) -> None:
        self._answer = answer
        self.pings = 0
        self.silent_for = 0

    def ping(self, *, timeout: timedelta) -> None:
        self.pings += 1
        if self.pings <= self.silent_for:
            raise GuestUnreachableError("silence")

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        return self._answer(command)

    def close(self) -> None:
        return


def _echo(command: Command) -> CommandResult:
    if command.argv[0] == "lost":
        raise GuestUnreachableError("the line broke")
    return CommandResult(exit_status=0, stdout=command.argv[0].encode())


def _ask(*words: str, closed: list[str] | None = None) -> Procedure[str]:
    try:
        said = []
        for word in words:
            result = yield Command(argv=(word,))
            said.append(result.text)
        return " ".join(said)
    finally:
        if closed is not None:
            closed.append("closed")


def _another_way() -> Procedure[str]:
    try:
        yield Command(argv=("lost",))
    except GuestUnreachableError:
        result = yield Command(argv=("found",))
        return result.text
    return ""


def test_a_procedure_is_driven_to_its_finding() -> None:
    found = converse(_ask("one", "two"), control=Scripted(_echo), timeout=MINUTE, cancel=FaultCancel())
    assert found == "one two"


def test_a_procedure_without_commands_has_a_finding_too() -> None:
    assert converse(_ask(), control=Scripted(_echo), timeout=MINUTE, cancel=FaultCancel()) == ""


def test_a_procedure_may_have_another_way() -> None:
    found = converse(_another_way(), control=Scripted(_echo), timeout=MINUTE, cancel=FaultCancel())
    assert found == "found"


def test_an_error_it_does_not_catch_is_raised_and_the_procedure_closed() -> None:
    closed: list[str] = []
    with pytest.raises(GuestUnreachableError):
        converse(_ask("lost", closed=closed), control=Scripted(_echo), timeout=MINUTE, cancel=FaultCancel())
    assert closed == ["closed"]


def test_a_bug_of_the_control_closes_the_procedure() -> None:
    def bug(_command: Command) -> CommandResult:
        raise ZeroDivisionError

    closed: list[str] = []
    with pytest.raises(ZeroDivisionError):
        converse(_ask("one", closed=closed), control=Scripted(bug), timeout=MINUTE, cancel=FaultCancel())
    assert closed == ["closed"]


def test_a_signal_ends_it_between_commands() -> None:
    cancel = FaultCancel()

    def ask_to_stop(command: Command) -> CommandResult:
        cancel.asked = True
        return _echo(command)

    closed: list[str] = []
    with pytest.raises(CancelledError):
        converse(_ask("one", "two", closed=closed), control=Scripted(ask_to_stop), timeout=MINUTE, cancel=cancel)
    assert closed == ["closed"]


def test_waiting_until_the_guest_answers() -> None:
    control = Scripted(_echo)
    control.silent_for = 3
    wait_until_answers(control, deadline=MINUTE, clock=FakeClock(), cancel=FaultCancel())
    assert control.pings == 4


def test_a_guest_that_never_answers_is_unreachable_after_the_deadline() -> None:
    control = Scripted(_echo)
    control.silent_for = 10**9
    clock = FakeClock()
    before = clock.monotonic()
    with pytest.raises(GuestUnreachableError, match="did not answer by agent within 0:01:00") as caught:
        wait_until_answers(control, deadline=MINUTE, clock=clock, cancel=FaultCancel())
    assert 60 <= clock.monotonic() - before < 70
    assert caught.value.remedy


def test_a_wait_is_ended_by_a_signal() -> None:
    control = Scripted(_echo)
    control.silent_for = 10**9
    cancel = FaultCancel()
    cancel.asked = True
    with pytest.raises(CancelledError):
        wait_until_answers(control, deadline=MINUTE, clock=FakeClock(), cancel=cancel)


def test_an_answer_that_is_an_error_is_not_waited_out() -> None:
    class Refusing(Scripted):
        def ping(self, *, timeout: timedelta) -> None:
            raise GuestCommandError("refused")

    with pytest.raises(GuestCommandError):
        wait_until_answers(Refusing(_echo), deadline=MINUTE, clock=FakeClock(), cancel=FaultCancel())
