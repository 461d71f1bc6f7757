"""The lab itself: its guests boot and behave as the other tests assume, and it notices what is left behind."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path

import libvirt
import paramiko
import pytest

from integration.lab import services
from integration.lab.client import LabClient
from integration.lab.commands import LabError, run
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lab.leaks import left_behind, look

MakeGuest = Callable[[GuestSpec], LabGuest]


def test_commands_run_in_the_guest(guest: LabGuest) -> None:
    result = guest.exec(["sh", "-c", "cat; echo no >&2; exit 7"], text="håndtag\n")
    assert (result.exit_status, result.stdout, result.stderr) == (7, "håndtag\n", "no\n")


def test_a_failing_command_is_an_error(guest: LabGuest) -> None:
    with pytest.raises(LabError, match="exit status 1"):
        guest.run(["false"])


def test_nothing_failed_while_booting(guest: LabGuest) -> None:
    assert guest.run(["systemctl", "--failed", "--no-legend"]) == ""


def test_the_databases_are_there(guest: LabGuest) -> None:
    assert guest.psql("SELECT count(*) FROM pgbench_accounts", database="bench") == "1000000"
    assert guest.psql("SELECT count(*) >= 0 FROM markers") == "t"
    clusters = [line.split()[:4] for line in guest.run(["pg_lsclusters", "--no-header"]).splitlines()]
    assert clusters == [["15", "aux", "5433", "down"], ["15", "main", "5432", "online"]]


def test_the_address_comes_from_the_labs_dhcp_server(lab: Lab, guest: LabGuest) -> None:
    assert ip_address(guest.address()) in ip_network(lab.gateway, strict=False)
    assert guest.address() in guest.run(["ip", "-o", "-4", "address", "show", "eth0"])
    assert f"DHCPACK(labprod) {guest.address()} {guest.spec.macs[0]}" in (lab.log / "dnsmasq.log").read_text()


def test_ssh_takes_the_labs_key_and_shows_the_images_host_key(lab: Lab, guest: LabGuest) -> None:
    assert guest.ssh_banner().startswith("SSH-2.0-")
    with paramiko.SSHClient() as client:
        kind, _, key = lab.image.host_key.partition(" ")
        client.get_host_keys().add(guest.address(), kind, paramiko.PKey.from_type_string(kind, _decode(key)))
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        limit_s = 15 * lab.time_factor
        client.connect(
            guest.address(),
            username="root",
            key_filename=str(lab.image.private_key),
            look_for_keys=False,
            allow_agent=False,
            timeout=limit_s,
            banner_timeout=limit_s,
            auth_timeout=limit_s,
        )
        _stdin, stdout, _stderr = client.exec_command("cat /etc/machine-id", timeout=limit_s)
        assert stdout.read().decode().strip() == guest.spec.uuid.replace("-", "")


def _decode(key: str) -> bytes:
    return base64.b64decode(key)


def test_pgbench_reports_transactions(lab: Lab, guest: LabGuest) -> None:
    guest.start_pgbench(clients=4)
    time.sleep(3 + lab.time_factor)
    progress = guest.stop_pgbench()
    assert len(progress) >= 3
    assert sum(step.tps for step in progress) > 0
    time.sleep(1.5)
    assert guest.pgbench_progress() == progress, "pgbench goes on after it was stopped"


def test_every_acknowledged_marker_is_in_the_table(guest: LabGuest) -> None:
    with LabClient(guest.address()) as client:
        client.wait_for_more(20)
    middle_s = client.markers[10].began_s
    numbers = {int(line) for line in guest.psql("SELECT n FROM markers").split()}
    acknowledged = {marker.number for marker in client.markers if marker.acknowledged_s is not None}
    assert acknowledged <= numbers
    assert client.acknowledged_before(middle_s) == {marker.number for marker in client.markers[:10]}
    assert client.begun_after(middle_s) == {marker.number for marker in client.markers[11:]}


def test_the_client_survives_a_restart_of_the_database(guest: LabGuest) -> None:
    with LabClient(guest.address()) as client:
        client.wait_for_more(3)
        guest.run(["pg_ctlcluster", "15", "main", "restart", "--mode", "fast"], timeout_s=60)
        client.wait_for_more(3)
    numbers = [marker.number for marker in client.markers]
    assert len(numbers) == len(set(numbers)), "a number was used twice"


def test_a_guest_with_everything(lab: Lab, make_guest: MakeGuest) -> None:
    """Two vCPUs, firmware, two NICs, a static address, a name full of traps, and one disk of every kind."""
    disks = (
        DiskSpec(format="raw", folder=lab.reflink / "disks"),
        DiskSpec(content="data", format="qcow2"),
        DiskSpec(content="blank", format="block"),
    )
    (lab.reflink / "disks").mkdir()
    name = "shop's <db> & “ø”.1"
    macs = ("52:54:00:12:34:56", "52:54:00:12:34:57")
    made = make_guest(GuestSpec(name=name, vcpus=2, disks=disks, macs=macs, static_address="10.77.0.5/24", nvram=True))
    try:
        assert made.domain.name() == name
        assert made.run(["cat", "/sys/class/dmi/id/bios_vendor"]).strip() != "SeaBIOS"
        assert made.run(["nproc"]).strip() == "2"
        assert "10.77.0.5/24" in made.run(["ip", "-o", "-4", "address", "show", "eth0"])
        assert made.ssh_banner().startswith("SSH-2.0-")
        sizes = [int(made.run(["blockdev", "--getsize64", f"/dev/vd{letter}"])) >> 20 for letter in "abc"]
        assert sizes == [3072, 512, 256]
        sources = {source.get("file") or source.get("dev") for source in _live(made).iterfind("devices/disk/source")}
        assert sources == {str(disk.source) for disk in made.disks}
        made.run(["pg_ctlcluster", "15", "aux", "start"], timeout_s=60)
        assert made.psql("SHOW data_directory", port=5433) == "/data/postgresql/15/aux"
        made.run(["dd", "if=/dev/zero", "of=/dev/vdc", "bs=1M", "count=1", "conv=fsync"])
    finally:
        made.remove()
        (lab.reflink / "disks").rmdir()


def _live(guest: LabGuest) -> ET.Element:
    return ET.fromstring(guest.domain.XMLDesc())  # noqa: S314 - from our own libvirtd


def test_a_guest_outlives_libvirtd(guest: LabGuest) -> None:
    pid = guest.run(["cat", "/proc/sys/kernel/random/boot_id"])
    services.stop_libvirtd(kill=True)
    with pytest.raises(libvirt.libvirtError):
        libvirt.open(services.URI)
    services.start_libvirt()
    guest.wait_for_agent()
    assert guest.run(["cat", "/proc/sys/kernel/random/boot_id"]) == pid


def test_a_new_guest_that_stands_still_is_started_once_more_and_told_of(
    define_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = define_guest(GuestSpec(memory_mib=384))
    start = made.start
    starts: list[int] = []

    def stands_still_at_first() -> None:
        start()
        starts.append(made.domain.ID())
        if len(starts) == 1:
            made.domain.suspend()

    monkeypatch.setattr(made, "start", stands_still_at_first)
    monkeypatch.setattr("integration.lab.guest.FIRST_LIMIT_S", 1.0)
    with pytest.warns(RuntimeWarning, match=f"started a second time.*state {libvirt.VIR_DOMAIN_PAUSED} .*IP=.*HLT="):
        made.boot_new()
    assert len(starts) == 2
    assert made.domain.ID() == starts[1] != starts[0]


def test_the_store_shares_blocks(store_dir: Path) -> None:
    (store_dir / "a").write_bytes(os.urandom(1 << 20))
    run(["cp", "--reflink=always", store_dir / "a", store_dir / "b"])
    assert (store_dir / "b").read_bytes() == (store_dir / "a").read_bytes()


def test_what_is_left_behind_is_noticed(lab: Lab, define_guest: MakeGuest) -> None:
    before = look(lab)
    run(["ip", "netns", "add", "leak-netns"])
    run(["ip", "link", "add", "leak-bridge", "type", "bridge"])
    run(["nft", "add", "table", "bridge", "leak-table"])
    (Path("/run") / "leak-dir").mkdir()
    run(["mount", "-t", "tmpfs", "leak", "/run/leak-dir"])
    handle = (lab.guests / "leak-file").open("w")
    made = define_guest(GuestSpec(name="leak-domain", disks=(DiskSpec(content="blank", format="block"),)))
    try:
        new, gone = left_behind(lab, before, patience_s=0)
    finally:
        made.remove()
        handle.close()
        (lab.guests / "leak-file").unlink()
        run(["umount", "/run/leak-dir"])
        (Path("/run") / "leak-dir").rmdir()
        run(["nft", "delete", "table", "bridge", "leak-table"])
        run(["ip", "link", "delete", "leak-bridge"])
        run(["ip", "netns", "delete", "leak-netns"])
    report = "\n".join(new)
    assert gone == []
    for trace in (
        "leak-netns",
        "link: leak-bridge",
        "bridge leak-table",
        "mount: /run/leak-dir",
        "'leak-domain'",
        "loop device",
        "open file: " + handle.name,
    ):
        assert trace in report
    assert str(made.disks[0].file) in report


def _start_inner_lab(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "VMSNAP_LAB_DIR": str(folder), "VMSNAP_LAB_KEEP_LOGS": ""}
    return subprocess.Popen([sys.executable, "-m", "integration.lab", "run", "--", *command], env=environment)


def test_a_lab_returns_the_commands_exit_status_and_clears_away(tmp_path: Path) -> None:
    # A lab within the lab; it needs nothing from outside.
    assert _start_inner_lab(tmp_path, "sh", "-c", "virsh list >/dev/null && exit 23").wait(timeout=120) == 23
    assert list(tmp_path.iterdir()) == []


def test_a_killed_lab_takes_everything_with_it(tmp_path: Path) -> None:
    note, folder = tmp_path / "note", tmp_path / "labs"
    inner = _start_inner_lab(
        folder, "sh", "-c", f"readlink /proc/self/ns/pid >{note}.new; mv {note}.new {note}; sleep 600"
    )
    try:
        _wait_until(note.exists)
        namespace = note.read_text().strip()
        assert _processes_in(namespace) >= 4  # the first process, virtlogd, libvirtd, the command
    finally:
        inner.kill()
        inner.wait(timeout=60)
    _wait_until(lambda: _processes_in(namespace) == 0)
    run([sys.executable, "-m", "integration.lab", "sweep"], environment={"VMSNAP_LAB_DIR": str(folder)})
    assert list(folder.iterdir()) == []
    assert str(folder) not in run(["losetup", "--list"])


def _wait_until(condition: Callable[[], bool], *, patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _processes_in(namespace: str) -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                found += str((entry / "ns" / "pid").readlink()) == namespace
    return found
