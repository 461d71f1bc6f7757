"""The Debian package in a guest booted with systemd: installed, units started as they are shipped, reloaded, removed.

There is no hypervisor in the guest, so every run there ends with a clear precondition error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import MakeGuest
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab

PACKAGES = Path(__file__).parents[1] / "build" / "package"
CONFIG = '[store]\npath = "/srv/vmsnap"\nallow_copies = true\n[daemon]\ntick = "2s"\n'


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as it is called there
        pass


@contextmanager
def served(lab: Lab, folder: Path) -> Iterator[str]:
    """Serve a folder to guests on the production network."""
    address = lab.gateway.split("/")[0]
    with ThreadingHTTPServer((address, 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{address}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Host:
    """The guest as a host of vmsnap."""

    def __init__(self, guest: LabGuest) -> None:
        self.guest = guest

    def sh(self, script: str, *, timeout_s: float = 30.0) -> str:
        return self.guest.run(["/bin/sh", "-eu", "-c", script], timeout_s=timeout_s).strip()

    def write(self, path: str, text: str) -> None:
        self.guest.run(["/bin/sh", "-c", 'mkdir -p "$(dirname "$0")" && cat >"$0"', path], text=text)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        said = self.sh(f"systemctl show {unit} --property={','.join(names)}")
        return dict(line.split("=", maxsplit=1) for line in said.splitlines())

    def journal(self, unit: str, *options: str) -> str:
        return self.sh(f"journalctl --unit={unit} --output=cat --no-pager {' '.join(options)}")

    def wait_for(self, what: str, look: Callable[[], bool], *, timeout_s: float = 15.0) -> None:
        end = time.monotonic() + timeout_s * self.guest.lab.time_factor
        while not look():
            if time.monotonic() > end:
                pytest.fail(f"{what}: not in time\n{self.sh('journalctl --no-pager --lines=60')}")
            time.sleep(0.5)


@pytest.fixture
def package() -> Path:
    found = sorted(PACKAGES.glob("vmsnap_*.deb"))
    if len(found) != 1:
        pytest.fail(f"there is no package in {PACKAGES}: run 'make package', which needs the network, outside the lab")
    return found[0]


def test_the_package_in_a_guest_with_systemd(lab: Lab, make_guest: MakeGuest, package: Path) -> None:
    host = Host(make_guest(GuestSpec(memory_mib=640)))
    with served(lab, package.parent) as url:
        host.guest.run(
            ["python3", "-c", f"from urllib.request import *; urlretrieve('{url}/{package.name}', '/tmp/vmsnap.deb')"],
            timeout_s=60,
        )
    host.sh(
        "systemctl stop postgresql; dpkg --install --force-unsafe-io /tmp/vmsnap.deb; rm /tmp/vmsnap.deb", timeout_s=120
    )

    # What the package made.
    assert host.sh("getent group vmsnap")
    modes = host.sh(
        "stat -c '%a %U:%G' /etc/vmsnap /etc/vmsnap/policies /etc/vmsnap/credentials /var/lib/vmsnap /run/vmsnap"
    )
    assert modes.splitlines() == [
        "750 root:vmsnap",
        "750 root:vmsnap",
        "700 root:root",
        "700 root:root",
        "711 root:root",
    ]
    assert host.sh("systemctl is-enabled vmsnap.service vmsnap-run.timer || true").split() == ["disabled", "disabled"]
    assert host.sh("vmsnap --version").startswith("vmsnap ")

    # Without a configuration the daemon is not even tried.
    host.sh("systemctl start vmsnap.service")
    assert host.show("vmsnap.service", "ActiveState", "ConditionResult") == {
        "ActiveState": "inactive",
        "ConditionResult": "no",
    }

    host.sh("mkdir /srv/vmsnap")
    host.write("/etc/vmsnap/vmsnap.toml", CONFIG)
    host.write("/etc/vmsnap/policies/db1.toml", "")
    host.write("/etc/vmsnap/credentials/dns.key", "secret")
    host.sh("systemctl enable --now vmsnap.service", timeout_s=60)  # returns when it says READY
    _hardened(host)
    _tells_what_is_missing(host)
    _reloads(host)

    # One at a time, and a stop that leaves nothing.
    assert host.guest.exec(["vmsnap", "daemon"]).exit_status == 4
    host.sh("systemctl disable --now vmsnap.service", timeout_s=60)
    assert host.show("vmsnap.service", "Result", "ExecMainStatus", "NRestarts") == {
        "Result": "success",
        "ExecMainStatus": "0",
        "NRestarts": "0",
    }
    assert "the daemon has ended in order" in host.journal("vmsnap.service")

    _timers_fire(host)

    host.sh("systemctl start vmsnap-verify.service", timeout_s=60)
    assert "Nothing is due." in host.journal("vmsnap-verify.service")

    host.sh("dpkg --remove vmsnap", timeout_s=60)
    assert (
        host.sh("ls -d /opt/vmsnap /usr/bin/vmsnap /etc/vmsnap/vmsnap.toml 2>/dev/null || true")
        == "/etc/vmsnap/vmsnap.toml"
    )


def _hardened(host: Host) -> None:
    """The kernel holds the daemon to what the unit says, and it sees the host's mounts."""
    pid = host.show("vmsnap.service", "MainPID", "ActiveState", "SubState")
    assert (pid["ActiveState"], pid["SubState"]) == ("active", "running")
    status = host.sh(f"grep -E '^(NoNewPrivs|Seccomp|CapBnd):' /proc/{pid['MainPID']}/status")
    facts = dict(line.split(":\t") for line in status.splitlines())
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    wanted = host.show("vmsnap.service", "CapabilityBoundingSet")["CapabilityBoundingSet"].split()
    assert int(facts["CapBnd"], 16).bit_count() == len(wanted)
    assert "cap_sys_module" not in wanted
    # What it mounts must be seen by libvirt: it is in the host's mount namespace, credentials or not.
    assert host.sh(f"readlink /proc/{pid['MainPID']}/ns/mnt /proc/1/ns/mnt | sort -u | wc -l") == "1"
    assert host.sh("cat /run/credentials/vmsnap.service/vmsnap_dns.key") == "secret"
    assert host.sh("stat -c %a /run/credentials/vmsnap.service/vmsnap_dns.key") == "400"


def _tells_what_is_missing(host: Host) -> None:
    """The due backup of the only guest ends with exit code 3, and the journal says what to do, by its priority."""
    host.wait_for("the backup's failure", lambda: "exit code 3" in host.journal("vmsnap.service", "--priority=err"))
    failures = host.journal("vmsnap.service", "--priority=err")
    assert "the backup of db1 failed (exit code 3): no libvirt answers at qemu:///system" in failures
    assert "What to do: install and start it" in failures
    everything = host.journal("vmsnap.service")
    assert "the daemon is up" in everything
    assert "<6>" not in everything
    status = host.show("vmsnap.service", "StatusText")["StatusText"]
    assert status.startswith("1 guest; ")
    assert "next db1 at " in status


def _reloads(host: Host) -> None:
    """Good files count, wrong ones are refused and named, and the process stays the same."""
    before = host.show("vmsnap.service", "MainPID")
    host.write("/etc/vmsnap/policies/db1.toml", "schedule.every = 'soon'\n")
    host.write("/etc/vmsnap/policies/db2.toml", "enabled = false\n")
    host.sh("systemctl reload vmsnap.service")
    host.wait_for("the refusal", lambda: "refused db1.toml" in host.show("vmsnap.service", "StatusText")["StatusText"])
    assert host.show("vmsnap.service", "StatusText")["StatusText"].startswith("2 guests; ")
    assert "refused /etc/vmsnap/policies/db1.toml: " in host.journal("vmsnap.service", "--priority=err")
    assert "what it said before stays" in host.journal("vmsnap.service", "--priority=err")
    host.write("/etc/vmsnap/policies/db1.toml", "")
    host.sh("systemctl reload vmsnap.service")
    host.wait_for("the recovery", lambda: "refused" not in host.show("vmsnap.service", "StatusText")["StatusText"])
    assert host.show("vmsnap.service", "MainPID") == before
    assert host.show("vmsnap.service", "ActiveState") == {"ActiveState": "active"}


def _timers_fire(host: Host) -> None:
    """The timers start their services by themselves; there, too, exit code 3 says that something is missing."""
    host.write("/etc/vmsnap/policies/db3.toml", "")
    for timer in ("vmsnap-run.timer", "vmsnap-backup@.timer"):
        host.write(
            f"/etc/systemd/system/{timer}.d/soon.conf",
            "[Timer]\nOnActiveSec=1s\nRandomizedDelaySec=0\nAccuracySec=1s\n",
        )
    host.sh("systemctl daemon-reload; systemctl start vmsnap-run.timer vmsnap-backup@db1.timer")
    for service in ("vmsnap-run.service", "vmsnap-backup@db1.service"):
        host.wait_for(service, lambda unit=service: host.show(unit, "ExecMainStatus")["ExecMainStatus"] == "3")  # type: ignore[misc]
        assert "no libvirt answers" in host.journal(service)
    host.sh("systemctl stop vmsnap-run.timer vmsnap-backup@db1.timer")
