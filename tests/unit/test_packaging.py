"""What stands before taking the program away: the package's removal, and an installation over one that runs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A program's place, with a process of it: its interpreter is a sleep."""
    place = tmp_path / "opt"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python3").symlink_to("/bin/sleep")
    with subprocess.Popen([str(place / "bin" / "python3"), "60"]) as process:
        yield place
        process.kill()


def _running(place: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "packaging" / "running.sh"
    return subprocess.run([str(script), str(place)], capture_output=True, text=True, timeout=30, check=False)


def test_what_runs_from_a_place_is_named(place: Path, tmp_path: Path) -> None:
    found = _running(place)
    assert found.returncode == 0
    assert found.stdout.endswith(f": {place}/bin/python3 60\n")
    nothing = _running(tmp_path / "elsewhere")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (1, "", "")


class Removal:
    """The package's script, over a host of its own. ``code`` is what the program says of it; None: there is no program."""

    def __init__(self, folder: Path, *, code: int | None, configured: bool = True) -> None:
        self._stopped = folder / "stopped"
        self._asked = folder / "asked"
        program = folder / "vmsnap"
        if code is not None:
            program.write_text(f"#!/bin/sh\necho \"$*\" >'{self._asked}'\nexit {code}\n")
            program.chmod(0o755)
        config = folder / "vmsnap.toml"
        if configured:
            config.touch()
        text = (ROOT / "debian" / "vmsnap.prerm").read_text(encoding="utf-8")
        text = text.replace("/etc/vmsnap/vmsnap.toml ]", f"{config} ]").replace("/opt/vmsnap/bin/vmsnap", str(program))
        self._script = folder / "prerm"
        self._script.write_text(text.replace("#DEBHELPER#", f"touch '{self._stopped}'"))

    def __call__(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["/bin/sh", str(self._script), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
        return done.returncode, done.stderr

    @property
    def stopped(self) -> bool:
        return self._stopped.exists()

    @property
    def asked(self) -> str:
        return self._asked.read_text().strip() if self._asked.exists() else ""


def test_a_removal_is_refused_while_the_program_is_needed(tmp_path: Path) -> None:
    removal = Removal(tmp_path, code=4)
    code, said = removal("remove")
    assert code == 1
    assert "move /etc/vmsnap/vmsnap.toml away first" in said
    assert removal.asked == "removable"
    assert not removal.stopped


@pytest.mark.parametrize("code", [0, 2, 70, None])
def test_a_removal_goes_on_where_nothing_needs_it_or_nobody_can_tell(tmp_path: Path, code: int | None) -> None:
    removal = Removal(tmp_path, code=code)
    assert removal("remove") == (0, "")
    assert removal.stopped


def test_an_upgrade_is_not_refused_and_neither_is_a_host_that_was_never_set_up(tmp_path: Path) -> None:
    upgrade = Removal(tmp_path, code=4)
    assert upgrade("upgrade", "9.9") == (0, "")
    assert (upgrade.stopped, upgrade.asked) == (True, "")
    (tmp_path / "bare").mkdir()
    bare = Removal(tmp_path / "bare", code=4, configured=False)
    assert bare("remove") == (0, "")
    assert (bare.stopped, bare.asked) == (True, "")
