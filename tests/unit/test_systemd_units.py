"""The units that are shipped: systemd takes them, they start commands that exist, and they are held as tightly as they say."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vmsnap.cli.main import app
from vmsnap.config.settings import DaemonSettings
from vmsnap.model.durations import parse_duration

ROOT = Path(__file__).parents[2]
SERVICES = sorted((ROOT / "systemd").glob("*.service"))
TIMERS = sorted((ROOT / "systemd").glob("*.timer"))
# What mounts, or makes clones, must share the host's mounts: none of these, which give a service its own.
SANDBOX = {
    "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectKernelTunables",
    "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset", "ReadWritePaths",
    "ReadOnlyPaths", "InaccessiblePaths", "BindPaths", "TemporaryFileSystem", "MountFlags", "RootDirectory",
}  # fmt: skip
MOUNTING = {"vmsnap", "vmsnap-run", "vmsnap-backup@", "vmsnap-reconcile", "vmsnap-expire", "vmsnap-env@"}
REMOTE = {
    "vmsnap", "vmsnap-run", "vmsnap-backup@", "vmsnap-reconcile", "vmsnap-expire", "vmsnap-verify", "vmsnap-gc",
    "vmsnap-export@",
}  # fmt: skip
TAKING_BACKUPS = ("vmsnap", "vmsnap-run", "vmsnap-backup@")


def section_of(unit: Path, name: str) -> dict[str, str]:
    """Return a section. Of a key that stands several times, all values, as in After."""
    found: dict[str, str] = {}
    section = ""
    for line in unit.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif section == name and line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[key] = f"{found[key]} {value}" if key in found else value
    return found


def seconds_of(text: str) -> float:
    return parse_duration(re.sub("min", "m", text)).total_seconds()


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed; Debian's package systemd has it", pytrace=False)
    return path


def test_systemd_takes_every_unit(tmp_path: Path) -> None:
    for unit in (*SERVICES, *TIMERS):
        # The program itself need not be installed where this is tested.
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/vmsnap ", "/bin/true "))
    said = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_a_unit_starts_a_command_that_exists(unit: Path) -> None:
    program, *arguments = shlex.split(section_of(unit, "Service")["ExecStart"])
    assert program == "/usr/bin/vmsnap"
    plain = [argument for argument in arguments if argument not in {"--", "%I"}]
    shown = CliRunner().invoke(app, [*plain, "--help"])
    assert shown.exit_code == 0, shown.output
    assert get_command(app).name is not None
    assert section_of(unit, "Unit")["ConditionPathExists"] == "/etc/vmsnap/vmsnap.toml"
    if "%I" in arguments:
        assert arguments[-2:] == ["--", "%I"]  # a name that begins with a hyphen is a name


@pytest.mark.parametrize("timer", TIMERS, ids=lambda unit: unit.stem)
def test_a_timer_has_its_service(timer: Path) -> None:
    assert timer.with_suffix(".service") in SERVICES
    assert section_of(timer, "Install") == {"WantedBy": "timers.target"}


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_services_that_mount_see_the_hosts_mounts_and_all_are_held_tightly(unit: Path) -> None:
    service = section_of(unit, "Service")
    assert bool(SANDBOX & set(service)) != (unit.stem in MOUNTING)
    assert service["NoNewPrivileges"] == "yes"
    assert service["SystemCallArchitectures"] == "native"
    assert set(service["SystemCallFilter"].split()) <= {"@system-service", "@mount", "pidfd_getfd"}
    capabilities = set(service["CapabilityBoundingSet"].split())
    assert not capabilities & {
        "CAP_SYS_MODULE",
        "CAP_SYS_RAWIO",
        "CAP_SYS_BOOT",
        "CAP_SYS_TIME",
        "CAP_MKNOD",
        "CAP_BPF",
    }
    assert ("CAP_SYS_ADMIN" in capabilities) == (unit.stem in MOUNTING)
    if unit.stem in MOUNTING - {"vmsnap-env@"}:
        assert service["KillMode"] == "mixed"  # tools are not killed over the head of the run that needs them


def test_what_dies_while_it_takes_backups_is_undone_at_once(tmp_path: Path) -> None:
    """And only then: an end in order leaves nothing, and says so by its exit status (EXIT_CODE in systemd.exec(5))."""
    vmsnap = tmp_path / "vmsnap"
    vmsnap.write_text('#!/bin/sh\necho "$@"\n')
    vmsnap.chmod(0o755)
    for unit in TAKING_BACKUPS:
        service = section_of(ROOT / "systemd" / f"{unit}.service", "Service")
        command = service["ExecStopPost"].replace("/usr/bin/vmsnap", str(vmsnap)).replace("$$", "$")
        # A failure of its own says nothing of the service.
        assert command.startswith("-")
        for ended, expected in (("exited", ""), ("killed", "reconcile"), ("dumped", "reconcile")):
            said = subprocess.run(
                shlex.split(command[1:]),
                env={"EXIT_CODE": ended},
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
            assert said.stdout.strip() == expected


def test_what_guards_a_guest_may_leave_the_service() -> None:
    """Its helpers ask systemd for scopes of their own, over its socket, which takes this capability to be listened to."""
    for unit in TAKING_BACKUPS:
        service = section_of(ROOT / "systemd" / f"{unit}.service", "Service")
        assert "AF_UNIX" in service["RestrictAddressFamilies"].split()
        assert "CAP_SYS_ADMIN" in service["CapabilityBoundingSet"].split()


def test_all_that_make_clones_are_held_alike() -> None:
    keys = (
        "CapabilityBoundingSet", "SystemCallFilter", "RestrictAddressFamilies", "RestrictNamespaces", "LockPersonality",
    )  # fmt: skip
    held = {tuple(section_of(unit, "Service")[key] for key in keys) for unit in SERVICES if unit.stem in MOUNTING}
    assert len(held) == 1


@pytest.mark.parametrize(
    "unit", [unit for unit in SERVICES if unit.stem != "vmsnap-dhcp-watch"], ids=lambda unit: unit.stem
)
def test_what_may_need_a_secret_is_given_it(unit: Path) -> None:
    service = section_of(unit, "Service")
    assert service["LoadCredential"] == "vmsnap:/etc/vmsnap/credentials"


@pytest.mark.parametrize("name", sorted(REMOTE))
def test_what_speaks_with_the_replica_may_and_waits_for_the_network(name: str) -> None:
    (unit,) = (unit for unit in SERVICES if unit.stem == name)
    service = section_of(unit, "Service")
    assert {"AF_INET", "AF_INET6"} <= set(service["RestrictAddressFamilies"].split())
    assert not {"PrivateNetwork", "IPAddressDeny", "JoinsNamespaceOf"} & set(service)
    assert "network-online.target" in section_of(unit, "Unit")["After"].split()


def test_systemd_waits_longer_than_the_daemon_does() -> None:
    service = section_of(ROOT / "systemd" / "vmsnap.service", "Service")
    assert service["Type"] == "notify"
    assert seconds_of(service["TimeoutStopSec"]) > DaemonSettings().stop_deadline.total_seconds()
    assert seconds_of(service["WatchdogSec"]) > 3 * DaemonSettings().tick.total_seconds()
    assert set(service["RestartPreventExitStatus"].split()) == {"2", "4"}
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"


def test_the_guide_gives_the_exposure_that_systemd_reckons() -> None:
    guide = (ROOT / "docs" / "operators-guide.md").read_text()
    shown = dict(re.findall(r"^\| `(vmsnap\S*)\.service` \| (\d+\.\d) \|", guide, re.MULTILINE))
    assert set(shown) == {unit.stem for unit in SERVICES}
    for unit in SERVICES:
        said = subprocess.run(
            [tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", "--json=off", str(unit)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        (score,) = re.findall(r"Overall exposure level for \S+: (\d+\.\d)", said)
        assert shown[unit.stem] == score, unit.stem


def test_the_watcher_may_listen_and_little_else() -> None:
    (unit,) = (unit for unit in SERVICES if unit.stem == "vmsnap-dhcp-watch")
    service = section_of(unit, "Service")
    assert {"CAP_NET_RAW", "CAP_NET_ADMIN"} <= set(service["CapabilityBoundingSet"].split())
    assert "AF_PACKET" in service["RestrictAddressFamilies"].split()
    assert service["StateDirectoryMode"] == "0700"


def test_the_package_puts_every_unit_in_place_and_enables_none() -> None:
    script = (ROOT / "packaging" / "install.sh").read_text()
    assert "systemd/*.service systemd/*.timer" in script
    rules = (ROOT / "debian" / "rules").read_text()
    assert "--no-enable" in rules
    for unit in (*SERVICES, *TIMERS):
        if section_of(unit, "Install") and "@" not in unit.stem:
            assert unit.name in rules, f"{unit.name} can be enabled, and debian/rules does not know it"
