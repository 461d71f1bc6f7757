"""The units that are shipped start commands that exist."""

from __future__ import annotations

import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vmsnap.cli.main import app

UNITS = sorted((Path(__file__).parents[2] / "systemd").glob("*.service"))


def section_of(unit: Path, name: str) -> dict[str, str]:
    parser = ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text(encoding="utf-8"))
    return dict(parser[name])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_a_command_that_exists(unit: Path) -> None:
    program, *arguments = shlex.split(section_of(unit, "Service")["ExecStart"])
    assert program == "/usr/local/bin/vmsnap"
    shown = CliRunner().invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0, shown.output
    assert get_command(app).name is not None
    assert section_of(unit, "Unit")["ConditionPathExists"] == "/etc/vmsnap/vmsnap.toml"


def test_the_watcher_may_listen_and_little_else() -> None:
    (unit,) = (unit for unit in UNITS if unit.stem == "vmsnap-dhcp-watch")
    service = section_of(unit, "Service")
    assert {"CAP_NET_RAW", "CAP_NET_ADMIN"} <= set(service["CapabilityBoundingSet"].split())
    assert "AF_PACKET" in service["RestrictAddressFamilies"].split()
    assert service["StateDirectoryMode"] == "0700"
    assert "CAP_SYS_ADMIN" not in service["CapabilityBoundingSet"]
