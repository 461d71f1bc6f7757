from __future__ import annotations

import hashlib
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import BugError
from vmsnap.guests.powershell_direct import PowerShellControl, command_line
from vmsnap.hypervisors.hyperv.commands import script_text
from vmsnap.model.command import Command
from vmsnap.testing.hyperv import direct
from vmsnap.testing.hyperv.direct import split_command_line


@given(st.lists(st.text(alphabet=st.sampled_from("ab \t\n\"\\'%$é^&|<>")), max_size=6))
def test_a_command_line_is_taken_apart_into_what_it_was_made_of(arguments: list[str]) -> None:
    assert split_command_line(command_line(arguments)) == tuple(arguments)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        # From Microsoft's page on parsing C command-line arguments.
        ("a\\\\b", "a\\\\b"),
        ('a\\"b', '"a\\\\\\"b"'),
        ("C:\\Program Files\\", '"C:\\Program Files\\\\"'),
        ("", '""'),
        ("D:\\data\\", "D:\\data\\"),
    ],
)
def test_windows_own_examples(argument: str, line: str) -> None:
    assert command_line((argument,)) == line


def test_more_than_windows_takes_is_refused() -> None:
    class Nobody:
        def run_program(self, *_: object, **__: object) -> object:
            raise AssertionError

    with pytest.raises(BugError, match="too many"):
        PowerShellControl(Nobody()).run(Command(argv=("x", "y" * 40_000)), timeout=timedelta(seconds=1))  # type: ignore[arg-type]


def test_the_twin_is_that_of_the_script() -> None:
    assert hashlib.sha256(script_text("run_in_guest").encode()).hexdigest() == direct.SCRIPT_SHA256
