"""The first process of a lab: furnishes its namespaces, starts its services, runs the command, reaps orphans.

Started by `host.run_in_lab` as PID 1 of fresh network, mount and PID namespaces; when it exits, the kernel ends everything else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from integration.lab import cgroups, emulator, services
from integration.lab.commands import run
from integration.lab.lab import VARIABLE, Lab

CHECKOUT = Path(__file__).resolve().parents[2]
XFS_SIZE = "24G"
TPM_AUTHORITY = "/var/lib/swtpm-localca"
LEASE_RANGE = "10.77.0.100,10.77.0.199,255.255.255.0,1h"

# Each setting differs from Debian's default for the reason given.
QEMU_CONF = """
# AppArmor profiles are loaded into the host's kernel and would outlive the lab.
security_driver = "none"
"""
LIBVIRTD_CONF = """
# There is no polkit in here; the socket lies in a namespace of its own.
auth_unix_ro = "none"
auth_unix_rw = "none"
"""


def main() -> int:
    """`python -m integration.lab.inside LAB.JSON COMMAND...`; the exit status is the command's."""
    os.environ[VARIABLE] = sys.argv[1]
    # So that a script kept anywhere can import the lab.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    lab = Lab.current()
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the terminal sends these to the command as well, which decides
    entered = cgroups.enter(lab.scratch.name)
    run(["mount", "-t", "sysfs", "sysfs", "/sys"])  # the host's would show the host's links
    cgroups.mount_again(entered)
    # Shared within the lab, as on any host with systemd, so that unmounting also reaches the mount namespaces of QEMU.
    run(["mount", "--make-rshared", "/"])
    _furnish(lab)
    _make_reflink_store(lab)
    _start_network(lab)
    _start_libvirt(lab)
    return _run_command(sys.argv[2:])


def _furnish(lab: Lab) -> None:
    # DHCP clients and others write to /etc (resolv.conf above all); what they write must not reach the host.
    run(["cp", "--archive", "/etc", lab.scratch / "etc"])
    run(["mount", "--bind", lab.scratch / "etc", "/etc"])
    for folder in ("/run", "/var/lib/libvirt", "/var/cache/libvirt"):
        run(["mount", "-t", "tmpfs", "-o", "mode=755", "lab", folder])
    if Path(TPM_AUTHORITY).exists():
        # libvirt has each new TPM certified; what for that is made must not stay on the host.
        run(["cp", "--archive", TPM_AUTHORITY, lab.scratch / "swtpm-localca"])
        run(["mount", "--bind", lab.scratch / "swtpm-localca", TPM_AUTHORITY])
    for folder in ("/run/lock", "/run/libvirt", "/run/netns", "/var/lib/libvirt/images"):
        Path(folder).mkdir()
    run(["mount", "--bind", "/run/netns", "/run/netns"])  # the first `ip netns add` would, and look like a leak
    run(["mount", "--make-shared", "/run/netns"])
    # libvirtd looks for it when it starts. It has no pages until somebody asks the kernel for some.
    Path("/run/hugepages").mkdir()
    run(["mount", "-t", "hugetlbfs", "hugetlbfs", "/run/hugepages"])
    for folder in ("boot", "guests", "log/libvirt/qemu", "xfs"):
        (lab.scratch / folder).mkdir(parents=True)
    run(["mount", "--bind", lab.log / "libvirt", "/var/log/libvirt"])
    shutil.copy(lab.image.kernel, lab.kernel)
    shutil.copy(lab.image.initrd, lab.initrd)
    emulator.mount_other()
    if lab.accelerator != "kvm":
        emulator.install(lab.emulator)

    if lab.accelerator != "kvm" and Path("/dev/kvm").exists():
        # libvirt throws its knowledge of QEMU away (8 s of probing at every call) while /dev/kvm looks usable but is not.
        no_kvm = lab.scratch / "no-kvm"
        no_kvm.touch(mode=0)
        run(["mount", "--bind", no_kvm, "/dev/kvm"])

    settings = lab.scratch / "etc-libvirt"
    shutil.copytree(
        "/etc/libvirt", settings, ignore=shutil.ignore_patterns("networks", "autostart", "*.xml", "secrets")
    )
    for folder in ("qemu/networks/autostart", "qemu/autostart", "hooks"):
        (settings / folder).mkdir(parents=True, exist_ok=True)
    for name, extra in (("qemu.conf", QEMU_CONF), ("libvirtd.conf", LIBVIRTD_CONF)):
        with (settings / name).open("a") as handle:
            handle.write(extra)
    run(["mount", "--bind", settings, "/etc/libvirt"])


def _make_reflink_store(lab: Lab) -> None:
    backing = lab.scratch / "xfs.raw"
    run(["truncate", "--size", XFS_SIZE, backing])
    run(["mkfs.xfs", "-q", "-m", "reflink=1", backing])
    run(["mount", "-o", "loop", backing, lab.reflink])


def _start_network(lab: Lab) -> None:
    run(["ip", "link", "set", "lo", "up"])
    run(["ip", "link", "add", lab.bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0"])
    run(["ip", "address", "add", lab.gateway, "dev", lab.bridge])
    run(["ip", "link", "set", lab.bridge, "up"])
    settings = [
        "--conf-file=/dev/null",
        "--port=0",  # no DNS
        f"--interface={lab.bridge}",
        "--bind-interfaces",
        "--dhcp-authoritative",
        f"--dhcp-range={LEASE_RANGE}",
        f"--dhcp-leasefile={lab.leases}",
        f"--log-facility={lab.log / 'dnsmasq.log'}",
        "--log-dhcp",
        "--user=root",  # to write the files above
        "--pid-file=/run/dnsmasq.pid",
    ]
    run(["dnsmasq", *settings])


def _start_libvirt(lab: Lab) -> None:
    services.start_libvirt(patience_s=30 * lab.time_factor)


def _run_command(command: list[str]) -> int:
    try:
        child = subprocess.Popen(command, preexec_fn=_default_signals)  # noqa: PLW1509 - no threads here
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while True:
        # PID 1 inherits every daemon, and libvirt waits for a QEMU to be gone, not merely dead.
        pid, status = os.waitpid(-1, 0)
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            child.returncode = code
            return code if code >= 0 else 128 - code


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
