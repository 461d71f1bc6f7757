"""The session configuration (JEA) that is shipped, and how its functions are called."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

from tests.unit.hyperv_endpoint import Host, connection
from vmsnap.errors import BugError
from vmsnap.hypervisors.hyperv.commands import Commands, function_name, script_names, script_text
from vmsnap.hypervisors.hyperv.transport import Transport
from vmsnap.testing.hyperv.endpoint import Endpoint, EndpointSettings, running

JEA = files("vmsnap.hypervisors.hyperv") / "jea"
SHIPPED = ("VmsnapHost.psm1", "VmsnapHost.psd1", "VmsnapHost.pssc", "RoleCapabilities/VmsnapHost.psrc")


def shipped(name: str) -> str:
    return Path(str(JEA / name)).read_text(encoding="utf-8")


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def endpoint(host: Host) -> Iterator[Endpoint]:
    settings = EndpointSettings(configurations=frozenset({"vmsnap", "Microsoft.PowerShell"}))
    with running(host.dispatch, settings=settings) as endpoint:
        yield endpoint


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_are_powershell(name: str) -> None:
    assert not Parser(Language(tree_sitter_powershell.language())).parse(shipped(name).encode()).root_node.has_error


def test_the_session_runs_no_text_and_shows_vmsnaps_functions_alone() -> None:
    assert "'RestrictedRemoteServer'" in shipped("VmsnapHost.pssc")
    assert "'NoLanguage'" in shipped("VmsnapHost.pssc")
    role = shipped("RoleCapabilities/VmsnapHost.psrc")
    assert "VisibleFunctions = @('VmsnapHost\\Invoke-Vmsnap*')" in role
    assert "VisibleCmdlets" not in role
    assert "VisibleExternalCommands" not in role


def test_every_script_has_a_function_of_its_own() -> None:
    names = [function_name(name) for name in script_names()]
    assert len(set(names)) == len(names) > 20
    assert function_name("run_in_guest") == "Invoke-VmsnapRunInGuest"


def test_a_constrained_session_is_sent_names(host: Host, endpoint: Endpoint) -> None:
    commands = Commands(Transport(connection(endpoint, configuration="vmsnap")))
    commands.run("list_machines", doing="list its VMs", timeout=timedelta(seconds=10))
    commands.close()
    (asked,) = host.asked
    assert (asked.configuration, asked.call.text, asked.call.is_script) == (
        "vmsnap",
        "Invoke-VmsnapListMachines",
        False,
    )


def test_any_other_session_is_sent_the_script_as_it_is(host: Host, endpoint: Endpoint) -> None:
    commands = Commands(Transport(connection(endpoint)))
    commands.run("list_machines", doing="list its VMs", timeout=timedelta(seconds=10))
    commands.close()
    (asked,) = host.asked
    assert asked.call.text == script_text("list_machines")
    assert asked.call.is_script


@pytest.mark.parametrize("name", ["../x", "List", "list_machines.ps1", "", "no_such_script"])
def test_only_scripts_of_the_package_are_run(name: str, endpoint: Endpoint) -> None:
    with pytest.raises(BugError):
        Commands(Transport(connection(endpoint))).run(name, doing="x")
