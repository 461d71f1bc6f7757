"""Which way exports are started, and what systemd is told. The process itself is in tests/contract/test_exports_contract.py."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.errors import ToolError
from vmsnap.exports.folder import ExportFolder
from vmsnap.exports.launching import ProcessLauncher, UnitLauncher, find_launcher
from vmsnap.model.ids import RunId

RUN = RunId("0123456789")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a systemctl was told that knows the units which are shipped, and refuses to start one that it was told to."""
    tools, said = tmp_path / "bin", tmp_path / "said"
    tools.mkdir()
    program = tools / "systemctl"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {said}\n[ "$1" != cat ] || [ -e {tmp_path}/units/"$2" ] || exit 1\n'
        f"[ ! -e {tmp_path}/refuses ] || {{ echo no >&2; exit 4; }}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    (tmp_path / "units").symlink_to(ROOT / "systemd")
    return said


def test_where_systemd_runs_the_unit_is_used_that_is_installed(tmp_path: Path, said: Path) -> None:
    assert isinstance(find_launcher(("x",), units=True, systemd=tmp_path), UnitLauncher)
    assert isinstance(find_launcher(("x",), units=False, systemd=tmp_path), ProcessLauncher)
    assert isinstance(find_launcher(("x",), units=True, systemd=tmp_path / "no systemd"), ProcessLauncher)
    (tmp_path / "units").unlink()
    assert isinstance(find_launcher(("x",), units=True, systemd=tmp_path), ProcessLauncher)


def test_what_systemd_is_told(tmp_path: Path, said: Path) -> None:
    folder, unit = ExportFolder(tmp_path, run=RUN), f"vmsnap-export@{RUN}.service"
    launcher = UnitLauncher()
    launcher.start(folder)
    launcher.stop(folder, deadline=timedelta(seconds=5))
    assert said.read_text().splitlines() == [f"start --no-block {unit}", f"stop {unit}", f"reset-failed {unit}"]
    (tmp_path / "refuses").touch()
    with pytest.raises(ToolError, match="status 4"):
        launcher.start(folder)
