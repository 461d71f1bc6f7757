"""An environment straight from S3: it boots while its data comes, outlives its export, and ends on a local image."""

from __future__ import annotations

import subprocess
import time
from datetime import UTC, datetime

from integration.installation import Installation
from integration.lab.guest import LabGuest
from integration.lazy_runs import export_of, first_sql_from_replica, kill_export, open_files_of
from integration.s3_server import S3Server
from vmsnap.model.objects import S3Place
from vmsnap.stores.objects.s3 import S3Objects
from vmsnap.stores.packs import holds


def test_a_test_vm_straight_from_s3(guest: LabGuest, vmsnap: Installation, s3_server: S3Server) -> None:
    vmsnap.policy(guest.name)
    place = S3Place(bucket=s3_server.bucket(), prefix="lazy", endpoint=s3_server.endpoint, region="us-east-1")
    objects = S3Objects(place, keys=s3_server.keys)
    credential = vmsnap.folder / "replica.toml"
    keys = s3_server.keys()
    credential.write_text(f'access_key = "{keys.access_key}"\nsecret_key = "{keys.secret_key}"\n')
    credential.chmod(0o600)
    vmsnap.write_config(
        extra=f'[replica]\nkind = "s3"\nbucket = "{place.bucket}"\nprefix = "lazy"\nendpoint = "{place.endpoint}"\n'
        f'region = "us-east-1"\ncredential = "{credential}"\n'
    )
    made = vmsnap.ok("backup", guest.name)
    vmsnap.ok("replicate", made["snapshot"])

    def die_and_come_back() -> None:
        assert made["snapshot"] in holds.held(objects, now=datetime.now(UTC))
        kill_export(vmsnap, "lazy")
        time.sleep(2)
        vmsnap.ok("reconcile")

    numbers = first_sql_from_replica(vmsnap, guest, made["snapshot"], on_the_way=die_and_come_back)
    print(numbers)
    assert numbers.lazy_read_share_at_first_sql < 0.25
    assert numbers.lazy_running_s < 3.0 * max(1.0, guest.lab.time_factor)

    export = export_of(vmsnap, "lazy")
    assert (export["phase"], export["alive"], export["damage"]) == ("local", False, [])
    assert made["snapshot"] not in holds.held(objects, now=datetime.now(UTC))
    local = vmsnap.store / ".exports" / export["run"] / "vda.raw"
    stored = next((vmsnap.store / guest.name / made["snapshot"]).glob("vda*.raw"))
    compared = subprocess.run(
        ["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", str(local), str(stored)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert compared.returncode == 0, compared
    files = open_files_of("lazy")
    assert str(local) in files
    assert any(file.endswith("vda.local.qcow2") for file in files)
    assert not any(file.endswith("vda.qcow2") for file in files)
    assert vmsnap.run("env", "destroy", "lazy").exit_code == 0
    assert not list((vmsnap.store / ".exports").iterdir())
