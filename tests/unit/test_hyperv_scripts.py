"""The PowerShell that is sent to Hyper-V hosts: constant files, whole, and without what must never be sent."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

from vmsnap.testing.hyperv import direct, leases
from vmsnap.testing.hyperv.cmdlets import check_call
from vmsnap.testing.hyperv.running import ALL
from vmsnap.testing.hyperv.twins import TWINS, digest_of

_FOLDER = files("vmsnap.hypervisors.hyperv") / "scripts"
_SCRIPTS = {entry.name: entry.read_text(encoding="utf-8") for entry in _FOLDER.iterdir() if entry.name.endswith(".ps1")}


def _nodes(text: str) -> Iterator[Any]:
    waiting: list[Any] = [Parser(Language(tree_sitter_powershell.language())).parse(text.encode()).root_node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(node.children))


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    for node in _nodes(text):
        if node.type == "command":
            words = [child.text.decode() for child in _nodes_of(node) if child.type == "command_parameter"]
            yield node.child_by_field_name("command_name").text.decode(), words


def _nodes_of(command: Any) -> Iterator[Any]:
    """Yield the nodes of a command, those of commands inside it left out."""
    waiting = list(command.children)
    while waiting:
        node = waiting.pop(0)
        if node.type != "command":
            yield node
            waiting[:0] = node.children


def test_there_are_scripts() -> None:
    assert len(_SCRIPTS) > 20


@pytest.mark.parametrize("name", sorted(_SCRIPTS))
def test_a_script_is_powershell_and_takes_its_values_as_parameters(name: str) -> None:
    text = _SCRIPTS[name]
    assert text.isascii()
    assert [(node.type, node.start_point) for node in _nodes(text) if node.type == "ERROR" or node.is_missing] == []
    assert text.splitlines()[0].startswith("# ")
    assert any(node.type == "param_block" for node in _nodes(text))
    assert "$ErrorActionPreference = 'Stop'" in text


@pytest.mark.parametrize("name", sorted(_SCRIPTS))
def test_no_script_evaluates_text_or_ends_a_guest_by_other_means_than_turning_a_clone_off(name: str) -> None:
    for command, parameters in _commands(_SCRIPTS[name]):
        folded = {parameter.lower().split(":")[0] for parameter in parameters}
        assert command.lower() not in {"invoke-expression", "iex", "restart-vm", "save-vm", "suspend-vm"}
        if command == "Stop-VM":
            assert name == "turn_off_machine.ps1"
            assert folded == {"-vm", "-turnoff", "-confirm"}
        if command == "Import-VM":
            assert folded == {"-compatibilityreport"}


@pytest.mark.parametrize("name", ["start_machine", "turn_off_machine", "remove_machine", "request_shutdown"])
def test_what_changes_a_machine_looks_for_the_tag_first(name: str) -> None:
    text = _SCRIPTS[f"{name}.ps1"]
    changes = min(
        text.index(word) for word in ("Start-VM", "Stop-VM -VM", "Remove-VM", "InitiateShutdown") if word in text
    )
    assert text.index("throw 'VmsnapNotOurs'") < changes


def test_every_script_has_a_twin_that_was_written_for_it_as_it_is_now() -> None:
    """After editing a script: look at its twin, then write the new digest there."""
    assert ALL
    twins = {name: twin.sha256 for name, twin in TWINS.items()} | {"run_in_guest": direct.SCRIPT_SHA256}
    assert {f"{name}.ps1" for name in twins} == set(_SCRIPTS)
    assert twins == {name: digest_of(name) for name in twins}
    assert leases.digest_now() == leases.SCRIPT_SHA256


def test_scripts_use_only_cmdlets_and_parameters_that_there_are() -> None:
    for text in _SCRIPTS.values():
        for command, parameters in _commands(text):
            check_call(command, parameters=[parameter for parameter in parameters if parameter.startswith("-")])
