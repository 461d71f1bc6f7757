"""The Debian package in a guest booted with systemd: installed, units started as they are shipped, reloaded, removed.

There is no hypervisor in the guest, so every run there ends with a clear precondition error.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.conftest import MakeGuest
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from tests.unit.listener import Listener, listening

PACKAGES = Path(__file__).parents[1] / "build" / "package"
CONFIG = """
[store]
path = "/srv/vmsnap"
allow_copies = true
[daemon]
tick = "2s"
[metrics]
listen = "127.0.0.1:9642"
textfile = "/var/lib/vmsnap.prom"
[notifications]
credential = "vmsnap_notifications.toml"
at_most_every = "1m"
"""

# A backup that starts a helper and a tool, and is killed.
DYING_AGENT = """
import os, subprocess, time
from pathlib import Path
from vmsnap.hypervisors.libvirt.outliving import outliving
helper = subprocess.Popen(outliving(("sleep", "600"), what="helper of a test"), start_new_session=True)
tool = subprocess.Popen(("sleep", "600"))
until = time.monotonic() + 60
while Path(f"/proc/{helper.pid}/comm").read_text() != "sleep\\n" and time.monotonic() < until:
    time.sleep(0.1)
Path("/run/agent.pids").write_text(f"{helper.pid} {tool.pid}")
os.kill(os.getpid(), 9)
"""


def unpack(package: Path, disk: Path) -> None:
    """Unpack a package on a guest's disk, as dpkg does before it configures: thousands of files are faster written here."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-o", "loop", str(disk), folder], check=True)
        try:
            subprocess.run(
                ["dpkg", f"--root={folder}", "--force-unsafe-io", "--unpack", str(package)],
                check=True,
                capture_output=True,
                timeout=120,
            )
        finally:
            subprocess.run(["umount", folder], check=True)


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

    def wait_for(self, what: str, look: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
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


@pytest.fixture
def listener(lab: Lab) -> Iterator[Listener]:
    """Where the guest sends notifications and pings, on the production network."""
    with listening(lab.gateway.split("/")[0]) as heard:
        yield heard


def test_the_package_in_a_guest_with_systemd(define_guest: MakeGuest, package: Path, listener: Listener) -> None:
    guest = define_guest(GuestSpec(memory_mib=512, disks=(DiskSpec(format="raw"),)))
    unpack(package, guest.disks[0].file)
    guest.start()
    guest.wait_for_agent()
    host = Host(guest)
    host.sh("dpkg --configure vmsnap", timeout_s=60)

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
    host.write(
        "/etc/vmsnap/credentials/notifications.toml",
        f'urls = ["{listener.url()}"]\ndead_man_url = "{listener.ping_url()}"\n',
    )
    host.sh("systemctl enable --now vmsnap.service", timeout_s=60)  # returns when it says READY
    _hardened(host)
    _tells_what_is_missing(host)
    _tells_somebody_and_prometheus(host, listener)
    _reloads(host)

    host.sh("systemctl disable --now vmsnap.service", timeout_s=60)
    assert host.show("vmsnap.service", "Result", "ExecMainStatus", "NRestarts") == {
        "Result": "success",
        "ExecMainStatus": "0",
        "NRestarts": "0",
    }
    assert "the daemon has ended in order" in host.journal("vmsnap.service")

    _timers_fire(host)

    _what_guards_a_guest_outlives_its_service(host)

    host.sh("systemctl start vmsnap-verify.service", timeout_s=60)
    assert "Nothing is due." in host.journal("vmsnap-verify.service")
    host.sh("systemctl start vmsnap-expire.service", timeout_s=60)
    assert "No environment has expired." in host.journal("vmsnap-expire.service")

    host.sh("dpkg --remove vmsnap", timeout_s=120)
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
    failure = "the backup of db1 failed (exit code 3): no libvirt answers at qemu:///system"
    host.wait_for("the backup's failure", lambda: failure in host.journal("vmsnap.service", "--priority=err"))
    failures = host.journal("vmsnap.service", "--priority=err")
    assert "What to do: install and start it" in failures
    everything = host.journal("vmsnap.service")
    assert "the daemon is up" in everything
    assert "<6>" not in everything
    host.wait_for("the next time", lambda: "next db1 at " in host.show("vmsnap.service", "StatusText")["StatusText"])
    assert host.show("vmsnap.service", "StatusText")["StatusText"].startswith("1 guest; ")


def _tells_somebody_and_prometheus(host: Host, listener: Listener) -> None:
    """From inside the hardened unit, with the URLs of its credential, a notification and pings get out."""

    def failures() -> list[str]:
        return [message["message"] for message in listener.messages if "db1: backup failed" in message["message"]]

    host.wait_for("a ping", lambda: bool(listener.pings))
    # What was found before the backup failed may have been told alone, and the next message is a minute later.
    host.wait_for("a notification", lambda: bool(failures()))
    assert len(failures()) == 1
    assert "What to do: install and start it" in failures()[0]
    scrape = "from urllib.request import *; print(urlopen('http://127.0.0.1:9642/metrics').read().decode())"
    for text in (host.guest.run(["python3", "-c", scrape]), host.sh("cat /var/lib/vmsnap.prom")):
        assert 'vmsnap_guest_failed_attempts{guest="db1"} 1.0' in text
    assert "t0ken" not in host.journal("vmsnap.service")


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
    host.sh("rm /etc/vmsnap/credentials/dns.key")  # an empty folder of credentials is none, and no failure
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


def _what_guards_a_guest_outlives_its_service(host: Host) -> None:
    """Held as tightly as the unit says, it gets a scope of its own; what else a killed backup leaves is ended, and undone."""
    unit = "vmsnap-backup@dying.service"
    host.write("/run/agent.py", DYING_AGENT)
    host.write(
        f"/etc/systemd/system/{unit}.d/agent.conf",
        "[Service]\nExecStart=\nExecStart=/opt/vmsnap/bin/python3 /run/agent.py\n",
    )
    host.sh(f"systemctl daemon-reload; systemctl start {unit} || true", timeout_s=120)
    helper, tool = host.sh("cat /run/agent.pids").split()
    assert host.sh(f"cat /proc/{helper}/comm") == "sleep"
    assert host.sh(f"cat /proc/{helper}/cgroup").endswith(".scope")
    assert host.sh(f"ls -d /proc/{tool} 2>/dev/null || true") == ""
    host.sh(f"kill {helper}")
    assert host.show(unit, "Result") == {"Result": "signal"}
    # 'vmsnap reconcile' was run, as far as it gets here.
    assert "no libvirt answers" in host.journal(unit)
