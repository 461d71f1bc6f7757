"""The README says what the code says."""

from __future__ import annotations

from pathlib import Path

from vmsnap.errors import ExitCode
from vmsnap.model.lifecycle import diagram

README = Path(__file__).parents[2] / "README.md"


def test_the_life_cycle_is_drawn_from_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in README.read_text(encoding="utf-8")


def test_every_exit_code_is_listed() -> None:
    text = README.read_text(encoding="utf-8").partition("Exit codes:")[2].partition("\n\n")[0]
    listed = {int(part.split()[0]) for part in text.replace("\n", " ").rstrip(".").split(";")}
    assert listed == {int(code) for code in ExitCode}
