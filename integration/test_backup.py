"""The main job from the command line, on a real guest under load: backup, list, verify, provision, destroy."""

from __future__ import annotations

import json
import socket
import time
import xml.etree.ElementTree as ET
from typing import Any

import libvirt
import psycopg

from integration.conftest import MakeGuest
from integration.demo.__main__ import RECOVERY_SIGNS, _last_start
from integration.installation import Installation, RunningVm, default_policy
from integration.lab.client import LabClient
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.markers import require_instant
from vmsnap.model.isolation import ProofKind

CHECKPOINT = "<domaincheckpoint><name>nightly</name></domaincheckpoint>"


def test_backup_under_load_and_a_test_vm_from_it(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    definition = guest.domain.XMLDesc(0)
    others = guest.domain.checkpointCreateXML(CHECKPOINT, 0)
    guest.start_pgbench(clients=2)
    try:
        with LabClient(guest.address()) as client:
            client.wait_for_more(5)
            first = vmsnap.ok("backup", guest.name)
            client.wait_for_more(5)
    finally:
        guest.stop_pgbench()

    assert _sources(guest.domain.XMLDesc(0)) == _sources(definition)
    assert guest.psql("SELECT count(*) >= 1 FROM markers") == "t", "the source still answers"
    assert 0 < first["capture"]["pause_ms"] < 500 * guest.lab.time_factor
    drain = first["drain"]
    assert drain["in_flight_at_start"] == drain["finished"] + drain["rolled_back"]
    assert {item["method"] for item in first["clean"]["evidence"]["instances"]} == {"in-guest", "disk"}
    assert first["isolation"]["rung"] == "none"
    proof = {(point["kind"], point["name"]): point["observed"] for point in first["isolation"]["proof"]}
    assert {kind for kind, _ in proof} == {kind.value for kind in ProofKind}
    assert proof["identity", "token in the original"] == "is not there"
    assert proof["identity", "boot id"].endswith("as the original's before the capture")
    assert proof["production", "ears on the host's links"].startswith("0 frames")
    assert any(
        "answers ARP" in text and "in the table of labprod" in text
        for (kind, _), text in proof.items()
        if kind == "original"
    )

    second = vmsnap.ok("backup", guest.name)
    assert second["store"]["new_bytes"] < first["store"]["new_bytes"]
    _require_hints(second, since=first)
    checked = ET.fromstring(others.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE))  # noqa: S314 - of libvirt
    assert all(int(disk.get("size", "0")) > 0 for disk in checked.findall("disks/disk")), "it goes on counting"
    others.delete(0)
    whole = vmsnap.run("verify", second["snapshot"], "--json")
    assert whole.exit_code == 0, whole.explain()
    assert [item["snapshot"] for item in vmsnap.ok("list", guest.name)["snapshots"]] == [
        first["snapshot"],
        second["snapshot"],
    ]
    verified = vmsnap.run("verify", first["snapshot"], "--json")
    assert verified.exit_code == 0, verified.explain()

    made = vmsnap.ok("provision", first["snapshot"], "--name", "copy of 'db' <1>", "--wait")
    vm = RunningVm(guest, name=made["environment"])
    vm.wait_for_postgresql()
    require_instant(client, vm, first["capture"])
    assert not [line for line in _last_start(vm) if any(sign in line for sign in RECOVERY_SIGNS)]
    assert vm.domain.UUIDString() != guest.domain.UUIDString()
    _reach(vmsnap, made["environment"], lab=guest.lab)
    held = vmsnap.run("prune", guest.name)
    assert held.exit_code == 0, held.explain()
    assert vmsnap.run("env", "destroy", made["environment"]).exit_code == 0
    assert vmsnap.ok("env", "list")["environments"] == []


def _require_hints(report: Any, *, since: Any) -> None:
    """The backup read what changed since another, and a sample of the rest."""
    assert {read["since"] for read in report["reads"].values()} == {since["snapshot"]}, report["reads"]
    assert all(read["sampled_blocks"] > 0 for read in report["reads"].values())
    assert report["store"]["read_bytes"] < since["store"]["read_bytes"] / 2
    assert report["store"]["read_bytes"] >= report["store"]["new_bytes"]
    print(f"read {report['store']['read_bytes']:,} of {since['store']['read_bytes']:,} bytes")


def _reach(vmsnap: Installation, name: str, *, lab: Lab) -> None:
    """The fenced test VM asks by DHCP, and has found nobody so far. Both its doors lead to it, at the same time."""
    waits = ("--wait", f"{round(60 * max(1.0, lab.time_factor))}s")
    began = time.monotonic()
    with vmsnap.going_on("env", "forward", name, "5432", *waits) as forwarded:
        print(f"forwarded after {time.monotonic() - began:.1f} s")
        with _database(forwarded["listen_address"], port=forwarded["listen_port"]) as connection:
            assert connection.execute("SELECT count(*) >= 5 FROM markers").fetchone() == (True,)
        began = time.monotonic()
        with vmsnap.going_on("env", "serve", name, *waits) as served:
            print(f"served after {time.monotonic() - began:.1f} s")
            assert (served["ports"], served["address"]) == ([22, 5432], forwarded["address"])
            assert vmsnap.ok("env", "show", name)["service_address"] == served["service_address"]
            with _database(served["service_address"], port=5432) as connection:
                assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
            with socket.create_connection((served["service_address"], 22), timeout=20) as connection_to_ssh:
                connection_to_ssh.settimeout(20 * max(1.0, lab.time_factor))
                assert connection_to_ssh.recv(4) == b"SSH-"
    closed = vmsnap.run("env", "forward", name, "5434", "--json")
    assert closed.exit_code == 3, closed.explain()
    assert "nothing listens on port 5434" in closed.document["error"]["brief"]


def _database(address: str, *, port: int) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(host=address, port=port, dbname="app", user="postgres", connect_timeout=60)


def test_several_disks_of_every_kind_and_firmware_variables(
    make_guest: MakeGuest, vmsnap: Installation, lab: Lab
) -> None:
    guest = make_guest(
        GuestSpec(
            name="many disks",
            disks=(DiskSpec(), DiskSpec(content="data", format="raw"), DiskSpec(content="blank", format="block")),
            nvram=True,
            macs=("52:54:00:aa:00:01", "52:54:00:aa:00:02"),
        )
    )
    overlay_dir = lab.scratch / "overlays"
    overlay_dir.mkdir()
    vmsnap.policy(guest.name, f'[capture]\noverlay_dir = "{overlay_dir}"\n' + default_policy(lab).split("\n", 1)[1])
    guest.run(["pg_ctlcluster", "15", "aux", "start"])
    guest.psql("INSERT INTO markers (n) VALUES (7)", port=5433)
    report = vmsnap.ok("backup", guest.name)
    assert {item["instance"] for item in report["drain"]["instances"]} == {"main:5432", "aux:5433"}
    assert not list(overlay_dir.iterdir())
    stored = vmsnap.ok("show", report["snapshot"])
    assert [disk["target"] for disk in stored["manifest"]["disks"]] == [disk.target for disk in guest.disks]
    made = vmsnap.ok("provision", f"{guest.name}@latest", "--wait")
    vm = RunningVm(guest, name=made["environment"])
    vm.wait_for_postgresql()
    vm.run(["pg_ctlcluster", "15", "aux", "start"])
    assert vm.psql("SELECT n FROM markers", port=5433) == "7"
    assert vmsnap.run("env", "destroy", made["environment"]).exit_code == 0
    overlay_dir.rmdir()


def test_the_second_of_two_runs_for_one_guest_is_told_to_wait(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    with vmsnap.start("backup", guest.name) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "capture" in line:
                break
        second = vmsnap.run("backup", guest.name, "--json")
        assert second.exit_code == 4, second.explain()
        assert "backup" in json.dumps(second.document)
        process.communicate(timeout=120 * guest.lab.time_factor)
    assert process.returncode == 0


def _sources(xml: str) -> list[str]:
    return [line.strip() for line in xml.splitlines() if "<source file=" in line or "<source dev=" in line]
