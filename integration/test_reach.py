"""Reaching clones without an agent, from the command line: by DHCP in the fence, and where the original lives."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import libvirt
import pytest

from integration.installation import Installation, default_policy
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.outside import SshGuest, file_system, over_ssh

STATIC = "10.77.0.20"
GATEWAY = "10.77.0.1"
FENCE_POOL = IPv4Network("198.18.0.0/15")
NETWORK = "test-lab"
NETWORK_XML = f"""
<network>
  <name>{NETWORK}</name>
  <forward mode='open'/>
  <bridge name='labtest' stp='off' delay='0'/>
  <ip address='10.78.0.1' netmask='255.255.255.0'>
    <dhcp><range start='10.78.0.100' end='10.78.0.150'/></dhcp>
  </ip>
</network>
"""


@pytest.fixture(scope="module")
def vmsnap(lab: Lab) -> Iterator[Installation]:
    # A file system of its own: the snapshots live as long as this module, and are no test's leftovers.
    with file_system(lab, "reach-store", kind="xfs", size_mib=24 << 10) as store:
        installation = Installation(lab, name="reach", store=store)
        installation.runtime.mkdir(mode=0o711)
        yield installation
        for folder in (installation.folder, installation.runtime):
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def moving(_shared_guest: Any) -> LabGuest:
    """A guest with DHCP and an agent, which the policies of this module do not use."""
    guest: LabGuest = _shared_guest.get()
    return guest


@pytest.fixture(scope="module")
def fixed(lab: Lab) -> Iterator[LabGuest]:
    """A guest with a static address, no agent, and a name that needs care."""
    name = "fixed \"guest\" & 'co' <1>.ü"
    with SshGuest(lab, GuestSpec(name=name, agent=False, static_address=f"{STATIC}/24")) as guest:
        yield guest


def ssh_policy(lab: Lab, *, ladder: tuple[str, ...], host_key: str | None = None, isolation: str = "") -> str:
    factor = max(1.0, lab.time_factor)
    text = default_policy(lab).replace("[control]\n", '[control]\nvia = "ssh"\n')
    text += f'[control.ssh]\nuser = "root"\nkey_file = "{lab.image.private_key}"\n'
    if host_key is not None:
        text += f'host_key = "{host_key}"\n'
    return text + (
        f'[isolation]\naddress = "always"\nladder = {json.dumps(ladder)}\nrung_deadline = "{round(60 * factor)}s"\n'
        f"{isolation}"
    )


def old_address() -> str:
    return f'old_address = "{STATIC}/24"\nold_gateway = "{GATEWAY}"\n'


def require_proven(vmsnap: Installation, report: Any) -> None:
    """The snapshot is stored, with all the evidence."""
    evidence = report["clean"]["evidence"]
    assert {item["method"] for item in evidence["instances"]} == {"in-guest", "disk"}
    assert evidence["file_systems"]
    assert report["isolation"]["proof"]
    shown = vmsnap.ok("show", report["snapshot"])
    assert shown["manifest"]["guest"] == report["guest"]


def require_home(guest: LabGuest) -> None:
    assert guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        xml = guest.domain.XMLDesc(flags)
        assert re.search(r"vmsnap-[0-9a-f]{10}", xml) is None, "neither definition names anything of a run"
        assert all(str(disk.source) in xml for disk in guest.disks)
    assert guest.psql("SELECT 'answers'") == "answers"


def lease_of(lab: Lab, guest: LabGuest) -> str:
    """The lease of a guest in production: address, name and client id, without the time it ends."""
    (line,) = (line for line in lab.leases.read_text().splitlines() if guest.spec.macs[0] in line)
    return line.split(maxsplit=1)[1]


@pytest.fixture(scope="module")
def moved(moving: LabGuest, vmsnap: Installation, lab: Lab) -> Any:
    """The report of a backup whose clone was moved to an address of the fence. No host key in the policy."""
    vmsnap.policy(moving.name, ssh_policy(lab, ladder=("link-flap",), isolation="clone_ports = [22, 5432]\n"))
    moving.address()  # waits until it has one: PostgreSQL may be up before
    lease = lease_of(lab, moving)
    report = vmsnap.ok("backup", moving.name)
    assert lease_of(lab, moving) == lease, "production's DHCP server heard nothing of the clone"
    return report


@pytest.fixture(scope="module")
def at_once(moving: LabGuest, fixed: LabGuest, moved: Any, vmsnap: Installation, lab: Lab) -> tuple[Any, Any]:
    """The reports of two backups at the same time. The second guest's address is not in its policy."""
    del moved  # it comes first: its snapshot is the older one
    text = default_policy(lab, extra='[isolation]\naddress = "always"\nladder = ["hot-plug"]\n')
    vmsnap.policy(moving.name, text + f'rung_deadline = "{round(60 * max(1.0, lab.time_factor))}s"\n')
    vmsnap.policy(fixed.name, ssh_policy(lab, ladder=("old-address",)))
    fixed.run(["true"])  # so that the host knows where it lives
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda guest: vmsnap.ok("backup", guest.name), (moving, fixed))
    return first, second


def test_a_clone_with_dhcp_is_moved_to_an_address_of_the_fence(
    moved: Any, moving: LabGuest, vmsnap: Installation
) -> None:
    isolation = moved["isolation"]
    assert isolation["rung"] == "link-flap"
    assert IPv4Address(isolation["address"]) in FENCE_POOL
    assert [(item["rung"], item["failure"]) for item in isolation["attempts"]] == [("link-flap", None)]
    journal = (vmsnap.state / "runs" / f"{moved['snapshot']}.jsonl").read_text(encoding="utf-8")
    served = re.search(r"the clone is served at ([0-9.]+), port 22, 5432", journal)
    assert served is not None, "its ports can be reached while it drains"
    assert IPv4Address(served[1]) in FENCE_POOL
    assert not [warning for warning in moved["warnings"] if "served" in warning]
    require_proven(vmsnap, moved)
    require_home(moving)


def test_two_guests_are_backed_up_at_the_same_time(
    at_once: tuple[Any, Any], moving: LabGuest, fixed: LabGuest, vmsnap: Installation
) -> None:
    by_agent, by_address = at_once
    assert by_agent["started"] < by_address["finished"]
    assert by_address["started"] < by_agent["finished"]
    assert by_agent["isolation"]["rung"] == "hot-plug"
    assert IPv4Address(by_agent["isolation"]["address"]) in FENCE_POOL
    assert by_address["isolation"]["rung"] == "old-address"
    assert by_address["isolation"]["address"] == STATIC, "found by the host's ARP table"
    assert by_address["guest"] == fixed.name
    for guest, report in ((moving, by_agent), (fixed, by_address)):
        require_proven(vmsnap, report)
        require_home(guest)


def test_the_watcher_keeps_a_guests_exchange_until_it_is_told_to_end(
    moving: LabGuest, vmsnap: Installation, lab: Lab
) -> None:
    vmsnap.policy(moving.name)
    kept = vmsnap.state / "exchanges" / f"{moving.spec.macs[0].replace(':', '-')}.json"
    process = vmsnap.start("dhcp", "watch", moving.name)
    try:
        end = time.monotonic() + 30 * lab.time_factor
        while not kept.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "no exchange was recorded"
            moving.run(["networkctl", "renew", "eth0"])
            time.sleep(1)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=20 * lab.time_factor)
    assert process.returncode == 0, output
    record = json.loads(kept.read_text())
    assert (record["address"], record["server"]) == (moving.address(), GATEWAY)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert f"{moving.address()} from {GATEWAY}, no nonce" in output
    assert "Stopped; " in output


def test_the_rungs_are_tried_in_order_and_each_failure_is_kept(fixed: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    key = lab.image.host_key
    for memory in (vmsnap.state / "rungs").iterdir():  # what worked last would come first
        memory.unlink()
    vmsnap.policy(
        fixed.name, ssh_policy(lab, ladder=("link-flap", "old-address"), host_key=key, isolation=old_address())
    )
    report = vmsnap.ok("backup", fixed.name)
    assert report["isolation"]["rung"] == "old-address"
    assert report["isolation"]["address"] == STATIC
    flap, old = report["isolation"]["attempts"]
    assert (flap["rung"], old["rung"]) == ("link-flap", "old-address")
    assert "no DHCP message" in flap["failure"]
    assert flap["seconds"] > 0
    assert old["failure"] is None
    require_proven(vmsnap, report)
    stored = vmsnap.ok("show", report["snapshot"])["manifest"]["isolation"]
    assert stored["attempts"] == report["isolation"]["attempts"]
    require_home(fixed)


def test_a_server_with_another_host_key_is_not_the_clone(fixed: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    kind, key = lab.image.host_key.split()[:2]
    another = f"{kind} {key[:-4]}{'AAAA' if not key.endswith('AAAA') else 'BBBB'}"
    vmsnap.policy(fixed.name, ssh_policy(lab, ladder=("old-address",), host_key=another, isolation=old_address()))
    before = vmsnap.ok("list", fixed.name)
    fixed.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    outcome = vmsnap.run("backup", fixed.name, "--json")
    assert outcome.exit_code == 5, outcome.explain()
    error = outcome.document["error"]
    assert error["class"] == "SafetyError"
    assert STATIC in error["brief"]
    assert "host_key" in error["remedy"]
    assert another in error["details"]
    assert error["also"] == []
    assert vmsnap.ok("list", fixed.name) == before
    require_home(fixed)
    assert fixed.psql("SELECT n FROM markers") == "1"


@pytest.fixture
def network(moving: LabGuest) -> Iterator[libvirt.virNetwork]:
    """A network of the lab's libvirt that leads nowhere: it has DHCP, and no rule of a firewall lets anything on."""
    made = moving.connection.networkDefineXML(NETWORK_XML)
    try:
        made.create()
        yield made
    finally:
        if made.isActive():
            made.destroy()
        made.undefine()


def test_a_test_vm_on_a_network_holds_its_snapshot(
    moving: LabGuest, at_once: tuple[Any, Any], moved: Any, network: libvirt.virNetwork, vmsnap: Installation, lab: Lab
) -> None:
    older, newer = moved["snapshot"], at_once[0]["snapshot"]
    made = vmsnap.ok("provision", older, "--name", "on a network", "--network", NETWORK, "--ttl", "1h", "--wait")
    name = made["environment"]
    address = leased(network, lab=lab)
    assert made["address"] == address
    with (
        vmsnap.going_on("env", "forward", name, "22") as forwarded,
        socket.create_connection((forwarded["listen_address"], forwarded["listen_port"]), timeout=20) as connection,
    ):
        connection.settimeout(20 * max(1.0, lab.time_factor))
        assert connection.recv(4) == b"SSH-"
    answer = over_ssh(lab, address, ["cat", "/sys/class/net/eth0/address"])
    assert answer.stdout.strip() != moving.spec.macs[0], "it has an address card of its own"
    (listed,) = vmsnap.ok("env", "list")["environments"]
    assert (listed["environment"], listed["network"], listed["snapshot"]) == (name, NETWORK, older)
    assert listed["state"] == "running"
    extended = vmsnap.ok("env", "extend", name, "--ttl", "2d")
    assert extended["expires"] > listed["expires"]
    assert vmsnap.ok("env", "show", name)["expires"] == extended["expires"]

    vmsnap.policy(moving.name, default_policy(lab, extra="[retention]\nkeep_last = 1\n"))
    held, newest = vmsnap.ok("prune", moving.name)["decisions"]
    assert (held["snapshot"], held["keep"], held["removed_bytes"]) == (older, True, None)
    assert any("environment" in reason for reason in held["reasons"])
    assert (newest["snapshot"], newest["keep"]) == (newer, True)

    assert vmsnap.run("env", "destroy", name).exit_code == 0
    assert vmsnap.ok("env", "list")["environments"] == []
    removed, kept = vmsnap.ok("prune", moving.name)["decisions"]
    assert (removed["snapshot"], removed["keep"]) == (older, False)
    assert removed["removed_bytes"] > 0
    assert kept["keep"]
    assert [item["snapshot"] for item in vmsnap.ok("list", moving.name)["snapshots"]] == [newer]
    gone = vmsnap.run("show", older, "--json")
    assert gone.exit_code == 3
    assert gone.document["error"]["class"] == "SnapshotNotFoundError"


def test_a_network_that_is_not_there_is_refused(at_once: tuple[Any, Any], vmsnap: Installation) -> None:
    outcome = vmsnap.run("provision", at_once[0]["snapshot"], "--network", "no-such-net", "--json")
    assert outcome.exit_code == 3, outcome.explain()
    error = outcome.document["error"]
    assert "no-such-net" in error["brief"]
    assert "virsh net-list" in error["remedy"]
    assert vmsnap.ok("env", "list")["environments"] == []


def test_a_network_that_the_original_is_in_is_refused(
    moving: LabGuest, at_once: tuple[Any, Any], vmsnap: Installation, lab: Lab
) -> None:
    beside = f"<network><name>beside</name><forward mode='bridge'/><bridge name='{lab.bridge}'/></network>"
    network = moving.connection.networkCreateXML(beside)
    try:
        outcome = vmsnap.run("provision", at_once[0]["snapshot"], "--network", "beside", "--json")
    finally:
        network.destroy()
    assert outcome.exit_code == 3, outcome.explain()
    assert "would take its address" in outcome.document["error"]["brief"]
    assert vmsnap.ok("env", "list")["environments"] == []


def leased(network: libvirt.virNetwork, *, lab: Lab) -> str:
    """The address that the only guest of a network has leased."""
    deadline = time.monotonic() + 20 * lab.time_factor
    while True:
        leases = network.DHCPLeases()
        if leases:
            (lease,) = leases
            return str(lease["ipaddr"])
        assert time.monotonic() < deadline, "nothing was leased"
        time.sleep(0.2)
