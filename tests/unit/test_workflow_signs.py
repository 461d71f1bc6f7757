"""By what a clone is told from its original, on Linux and on Windows."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

from vmsnap.errors import GuestCommandError
from vmsnap.guests.powershell_direct import PowerShellControl, command_line
from vmsnap.model.command import Command
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import ProgramEnd, ProgramOutcome
from vmsnap.workflow.signs import Signs, signs_of

RUN = RunId("0123456789")
TOKEN = "ab" * 16


def _commands(signs: Signs) -> Iterator[Command]:
    yield from (signs.write, signs.read, signs.boot)


def _script(command: Command) -> str:
    return base64.b64decode(command.argv[-1]).decode("utf-16-le")


@pytest.mark.parametrize("method", ["agent", "ssh", "powershell"])
def test_a_token_stands_in_no_command_line_and_is_named_after_its_run(method: str) -> None:
    signs = signs_of(method, run=RUN, token=TOKEN)
    assert not any(TOKEN in word for command in _commands(signs) for word in command.argv)
    assert TOKEN.encode() in signs.write.stdin
    assert RUN in signs.place


def test_on_linux_it_is_a_file_in_memory() -> None:
    signs = signs_of("agent", run=RUN, token=TOKEN)
    assert signs.write.argv == ("tee", f"/run/vmsnap-{RUN}")
    assert signs.read.argv == ("cat", f"/run/vmsnap-{RUN}")


def test_on_windows_the_scripts_are_constant_and_the_key_is_volatile() -> None:
    first, second = signs_of("powershell", run=RUN, token=TOKEN), signs_of("powershell", run=RunId("f" * 10), token="x")
    assert [command.argv for command in _commands(first)] == [command.argv for command in _commands(second)]
    parser = Parser(Language(tree_sitter_powershell.language()))
    for command in _commands(first):
        assert command.argv[:2] == ("powershell.exe", "-NoProfile")
        assert not parser.parse(_script(command).encode()).root_node.has_error
        assert len(command_line(command.argv[1:])) < 8192
    assert "RegistryOptions]::Volatile" in _script(first.write)


@dataclass
class Registry:
    """A Windows guest at the other end of PowerShell Direct that knows the scripts of ``signs``."""

    keys: dict[str, str] = field(default_factory=dict)
    administrator: bool = True

    def run_program(
        self, program: str, *, arguments: str, stdin: bytes, timeout: timedelta, cancel: Cancel | None
    ) -> ProgramEnd:
        assert program == "powershell.exe"
        script = base64.b64decode(arguments.rpartition(" ")[2]).decode("utf-16-le")
        words = stdin.decode()
        if "CreateSubKey" in script:
            if not self.administrator:
                return ProgramEnd(outcome=ProgramOutcome.ENDED, code=1, stderr=b"Zugriff verweigert")
            run, token = words.split(" ")
            self.keys[run] = token
            return ProgramEnd(outcome=ProgramOutcome.ENDED, code=0)
        answer = self.keys.get(words, "") if "OpenSubKey" in script else "2026-11-21T02:00:00.0000000Z"
        return ProgramEnd(outcome=ProgramOutcome.ENDED, code=0, stdout=answer.encode())


def test_a_windows_clone_shows_the_token_that_it_was_given_and_another_does_not() -> None:
    signs = signs_of("powershell", run=RUN, token=TOKEN)
    clone, original = PowerShellControl(Registry()), PowerShellControl(Registry())
    assert clone.run(signs.write, timeout=timedelta(seconds=1)).exit_status == 0
    assert clone.run(signs.read, timeout=timedelta(seconds=1)).text == TOKEN
    assert original.run(signs.read, timeout=timedelta(seconds=1)).text == ""
    assert clone.run(signs.boot, timeout=timedelta(seconds=1)).text.startswith("2026")


def test_an_account_that_may_not_write_the_registry_is_told() -> None:
    signs = signs_of("powershell", run=RUN, token=TOKEN)
    clone = PowerShellControl(Registry(administrator=False))
    assert clone.run(signs.write, timeout=timedelta(seconds=1)).exit_status == 1
    with pytest.raises(GuestCommandError):
        clone.run(Command(argv=("hostname",), user="postgres"), timeout=timedelta(seconds=1))
