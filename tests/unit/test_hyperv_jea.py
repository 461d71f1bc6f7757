"""The session configuration for Hyper-V hosts has every script of this version, and lets an account call those alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Node, Parser

from vmsnap.hypervisors.hyperv.commands import function_name, script_names, script_text
from vmsnap.hypervisors.hyperv.jea import jea_files


def _root(text: str) -> Node:
    return Parser(Language(tree_sitter_powershell.language())).parse(text.encode()).root_node


def test_each_script_is_a_function_as_it_is() -> None:
    module = jea_files("HV1\\vmsnap")["Vmsnap.psm1"]
    root = _root(module)
    assert not root.has_error
    functions = [
        child.text.decode().split()[1]
        for node in root.children
        for child in [node, *node.children]
        if child.type == "function_statement" and child.text is not None
    ]
    assert functions == [function_name(name) for name in script_names()]
    assert all(script_text(name) in module for name in script_names())


@pytest.mark.parametrize("account", ["HV1\\vmsnap", "O'Brien", "x' = 1 }; Stop-Computer; @{ 'y", "\u2019 }; exit"])
def test_an_account_is_a_text_and_nothing_else(account: str) -> None:
    for name, text in jea_files(account).items():
        root = _root(text)
        assert not root.has_error, name
    root = _root(jea_files(account)["Vmsnap.pssc"])
    assert len(root.named_children) == 1
    assert b"Stop-Computer" not in [node.text for node in _commands(root)]
    assert not _commands(root)


def _commands(root: Node) -> list[Node]:
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        found += [node] if node.type == "command" else []
        waiting += node.children
    return found


def test_no_cmdlet_is_visible(tmp_path: Path) -> None:
    files = jea_files("HV1\\vmsnap")
    assert "VisibleCmdlets" not in files["RoleCapabilities/Vmsnap.psrc"]
    assert "Invoke-VmsnapExportMachine" in files["RoleCapabilities/Vmsnap.psrc"]
    assert "RestrictedRemoteServer" in files["Vmsnap.pssc"]


def test_the_files_are_written_as_windows_powershell_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "Vmsnap"
    argv = [sys.executable, "-m", "vmsnap.hypervisors.hyperv.jea", "--account", "HV1\\vmsnap", str(folder)]
    subprocess.run(argv, check=True, timeout=60)
    written = (folder / "Vmsnap.psm1").read_bytes()
    assert written.startswith(b"\xef\xbb\xbf")
    assert b"\r\n" in written
    assert b"\n" not in written.replace(b"\r\n", b"")
    assert (folder / "RoleCapabilities" / "Vmsnap.psrc").exists()
