"""What every implementation of ``vmsnap.ports.guest.GuestControl`` must do.

A test module subclasses ``GuestControlContract`` and gives it the fixtures ``control`` (a guest that answers) and
``lost`` (the same kind of control, whose guest does not answer).
"""
# ruff: noqa: S101, D102 - this module is a test suite; its tests are named by sentences

from __future__ import annotations

from datetime import timedelta
from threading import Thread

import pytest

from vmsnap.errors import DeadlineError, GuestUnreachableError
from vmsnap.model.command import Command, CommandResult
from vmsnap.ports.guest import GuestControl

QUICK = timedelta(seconds=120)
HARD_ARGUMENTS = (
    "plain",
    "two words",
    "",
    "it's",
    'say "hi"',
    "$HOME `id` $(id) \\ ; & | > < * ? ~ # ! {a,b} [x]",
    "-n",
    "--",
    "new\nline",
    "tab\tand\rreturn",
    "\N{SNOWMAN} \N{LATIN SMALL LETTER A WITH DIAERESIS}",
    "%s%n",
    "x" * 5000,
)
EVERY_BYTE = bytes(range(256)) * 128
ENDS_BY_SIGNAL = ("sh", "-c", "kill -9 $$")
BOTH_STREAMS_AND_STATUS = ("sh", "-c", "echo out; echo err >&2; exit 3")
BUSY_ON_BOTH_STREAMS = ("sh", "-c", 'head -c "$1" /dev/zero >&2; head -c "$1" /dev/zero; cat', "sh")
"""Followed by a number of bytes."""


class GuestControlContract:
    """The suite.

    ``much_output`` and ``much_input`` are more bytes than fit a buffer between a program and us, or the most that a
    control takes.
    """

    much_output = 3_000_000
    much_input = 3_000_000

    @pytest.fixture
    def control(self) -> GuestControl:
        raise NotImplementedError

    @pytest.fixture
    def lost(self) -> GuestControl:
        raise NotImplementedError

    def test_it_names_its_method(self, control: GuestControl) -> None:
        assert control.method in {"agent", "ssh", "powershell"}

    def test_ping_returns_where_the_guest_answers(self, control: GuestControl) -> None:
        control.ping(timeout=QUICK)
        control.ping(timeout=QUICK)

    def test_a_program_runs_and_its_output_comes_back(self, control: GuestControl) -> None:
        result = control.run(Command(argv=("echo", "hello")), timeout=QUICK)
        assert result == CommandResult(exit_status=0, stdout=b"hello\n", stderr=b"", truncated=False)

    def test_a_failing_exit_status_is_a_result(self, control: GuestControl) -> None:
        assert control.run(Command(argv=("false",)), timeout=QUICK).exit_status == 1

    def test_streams_stay_apart_and_the_status_is_kept(self, control: GuestControl) -> None:
        result = control.run(Command(argv=BOTH_STREAMS_AND_STATUS), timeout=QUICK)
        assert (result.exit_status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")

    def test_a_signal_is_128_and_its_number(self, control: GuestControl) -> None:
        assert control.run(Command(argv=ENDS_BY_SIGNAL), timeout=QUICK).exit_status == 128 + 9

    def test_a_missing_program_is_status_127(self, control: GuestControl) -> None:
        result = control.run(Command(argv=("no-such-program-at-all", "x")), timeout=QUICK)
        assert result.exit_status == 127
        assert result.stderr

    def test_programs_run_in_the_root_folder(self, control: GuestControl) -> None:
        # Which every account may enter, unlike the home of the one that logs in.
        assert control.run(Command(argv=("pwd",)), timeout=QUICK).stdout == b"/\n"

    @pytest.mark.parametrize("argument", HARD_ARGUMENTS)
    def test_arguments_arrive_as_they_are(self, control: GuestControl, argument: str) -> None:
        result = control.run(Command(argv=("printf", "%s", argument)), timeout=QUICK)
        assert result.stdout.decode() == argument

    def test_every_byte_goes_in_and_comes_out(self, control: GuestControl) -> None:
        assert control.run(Command(argv=("cat",), stdin=EVERY_BYTE), timeout=QUICK).stdout == EVERY_BYTE

    def test_no_input_is_an_empty_input(self, control: GuestControl) -> None:
        assert control.run(Command(argv=("cat",)), timeout=QUICK).stdout == b""

    def test_input_nobody_reads_is_no_error(self, control: GuestControl) -> None:
        result = control.run(Command(argv=("true",), stdin=b"x" * self.much_input), timeout=QUICK)
        assert result.exit_status == 0

    def test_a_program_busy_on_all_streams_does_not_stop_everything(self, control: GuestControl) -> None:
        command = Command(argv=(*BUSY_ON_BOTH_STREAMS, str(self.much_output)), stdin=b"x" * self.much_input)
        result = control.run(command, timeout=QUICK)
        assert result.stderr == bytes(self.much_output)
        assert result.stdout == bytes(self.much_output) + command.stdin
        assert not result.truncated

    def test_output_is_cut_at_16_mib(self, control: GuestControl) -> None:
        size = 16 << 20
        result = control.run(Command(argv=("head", "-c", str(size + 1), "/dev/zero")), timeout=QUICK)
        assert result.truncated
        assert len(result.stdout) <= size

    def test_a_command_that_takes_too_long_is_given_up(self, control: GuestControl) -> None:
        with pytest.raises(DeadlineError) as caught:
            control.run(Command(argv=("sleep", "20")), timeout=timedelta(milliseconds=300))
        assert "sleep" in caught.value.brief
        assert caught.value.remedy

    def test_the_commands_own_limit_wins(self, control: GuestControl) -> None:
        with pytest.raises(DeadlineError):
            control.run(Command(argv=("sleep", "20"), timeout=timedelta(milliseconds=300)), timeout=QUICK)
        slow = Command(argv=("sleep", "0.5"), timeout=QUICK)
        assert control.run(slow, timeout=timedelta(milliseconds=1)).exit_status == 0

    def test_it_works_after_a_deadline(self, control: GuestControl) -> None:
        with pytest.raises(DeadlineError):
            control.run(Command(argv=("sleep", "20")), timeout=timedelta(milliseconds=300))
        assert control.run(Command(argv=("echo", "again")), timeout=QUICK).stdout == b"again\n"

    def test_two_commands_may_run_at_once(self, control: GuestControl) -> None:
        results: dict[int, bytes] = {}

        def work(number: int) -> None:
            command = Command(argv=("printf", "%s", str(number)))
            results[number] = b"".join(control.run(command, timeout=QUICK).stdout for _ in range(5))

        threads = [Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: str(number).encode() * 5 for number in range(3)}

    def test_a_guest_that_does_not_answer_is_unreachable(self, lost: GuestControl) -> None:
        with pytest.raises(GuestUnreachableError):
            lost.ping(timeout=timedelta(seconds=2))
        with pytest.raises(GuestUnreachableError):
            lost.run(Command(argv=("true",)), timeout=timedelta(seconds=2))

    def test_close_may_be_repeated(self, control: GuestControl) -> None:
        control.close()
        control.close()
