"""What shows only in the clone, or while it runs: the run ends with the reason, and nothing of it stays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from integration.installation import Installation, default_policy
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.outside import file_system, fill, over_ssh
from integration.refusals import refused, ssh_section, unchanged


def test_no_database_in_the_guest(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    guest.run(["systemctl", "stop", "postgresql"])
    try:
        with unchanged(vmsnap, guest):
            refused(vmsnap, "backup", guest.name, code=3, names=("PostgreSQL",), remedy="database.clusters")
    finally:
        guest.run(["systemctl", "start", "postgresql"])
        guest.wait_for_postgresql()


def test_a_key_that_the_guest_does_not_let_in(guest: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    key = vmsnap.folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=60)
    text = default_policy(lab).replace("[control]\n", '[control]\nvia = "ssh"\n')
    text += ssh_section(lab, key_file=key) + '[isolation]\nladder = ["old-address"]\n'
    vmsnap.policy(guest.name, text)
    with unchanged(vmsnap, guest):
        names = (str(key), "root", guest.address())
        refused(vmsnap, "backup", guest.name, code=3, names=names, remedy="authorized_keys")
    assert guest.psql("SELECT 1") == "1"


FAKE_AGENT = r"""
use strict;
my $mode = $ARGV[0];
open(my $port, '+<:raw', '/dev/virtio-ports/org.qemu.guest_agent.0') or die $!;
sub put { defined(syswrite($port, $_[0])) or select(undef, undef, undef, 0.1) }
sub flood { put($_[0]); my $much = 'x' x 65536; for (1 .. 1600) { put($much) } put("\n") }
sub answer {
    my ($asked) = @_;
    my ($id) = $asked =~ /"id":\s*(\d+)/;
    if ($mode eq 'rubbish') { put("}{ \x00\xfe rubbish\n") }
    elsif ($mode eq 'flood') { flood('') }
    elsif ($asked =~ /guest-sync-delimited/) { put("\xff{\"return\": $id}\n") }
    elsif ($asked =~ /guest-sync/) { put("{\"return\": $id}\n") }
    elsif ($asked =~ /guest-exec/) { flood('{"return": {"pid": 1') }
    else { put("{\"return\": {}}\n") }
}
my $text = '';
while (1) {
    my $count = sysread($port, my $part, 4096);
    if (!$count) { select(undef, undef, undef, 0.1); next }
    $text .= $part;
    while ($text =~ s/^([^\n]*)\n//) { answer($1) }
}
"""


@contextmanager
def fake_agent(guest: LabGuest, *, mode: str) -> Iterator[None]:
    """The guest's agent is another program: 'rubbish', 'flood' (100 MB for an answer), 'late' (that to commands only)."""
    guest.run(["sh", "-c", "cat > /run/fake-agent"], text=FAKE_AGENT)
    options = ["--unit=fake-agent", "--collect", "--property=Conflicts=qemu-guest-agent.service", "--no-block"]
    address = guest.address()

    def inside(*command: str) -> None:
        done = over_ssh(guest.lab, address, command, timeout_s=60)
        assert done.exit_status == 0, done

    inside("systemctl", "stop", "qemu-guest-agent.service")
    try:
        inside("systemd-run", *options, "perl", "/run/fake-agent", mode)
        if mode == "late":
            guest.wait_for_agent()
        yield
    finally:
        inside("systemctl", "stop", "fake-agent.service")
        inside("systemctl", "start", "qemu-guest-agent.service")
        guest.wait_for_agent()


@pytest.mark.parametrize("mode", ["rubbish", "flood"])
def test_an_agent_that_talks_nonsense(guest: LabGuest, vmsnap: Installation, mode: str) -> None:
    vmsnap.policy(guest.name)
    with fake_agent(guest, mode=mode), unchanged(vmsnap, guest):
        refused(vmsnap, "backup", guest.name, code=3, names=(repr(guest.name),), remedy="qemu-guest-agent")


def test_an_agent_that_floods_its_clone(guest: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(guest.name)
    with fake_agent(guest, mode="late"), unchanged(vmsnap, guest):
        # The class tells the flood from a clone that never answered at all.
        error = refused(vmsnap, "backup", guest.name, code=7, names=("agent",), remedy="qemu-guest-agent")
        assert error["class"] == "GuestCommandError", error


def test_a_store_without_reflinks_holds_whole_copies_until_it_is_full(
    guest: LabGuest, vmsnap: Installation, lab: Lab
) -> None:
    vmsnap.policy(guest.name)
    with file_system(lab, "copies", kind="ext4", size_mib=4 << 10) as folder:
        vmsnap.store = folder
        vmsnap.write_config(extra="allow_copies = true")
        report = vmsnap.ok("backup", guest.name)
        assert any("no reflinks" in warning for warning in report["warnings"])
        assert vmsnap.ok("verify", report["snapshot"])["intact"]
        taken = fill(folder, leave_mib=50)
        with unchanged(vmsnap, guest):
            names = ("no space left", str(folder))
            refused(vmsnap, "backup", guest.name, code=3, names=names, remedy="vmsnap prune", kind="NoSpaceError")
        taken.unlink()
        (kept,) = vmsnap.ok("list", guest.name)["snapshots"]
        assert kept["snapshot"] == report["snapshot"]


def test_overlays_that_fill_their_file_system_during_a_run(guest: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    written_mib = 900
    with file_system(lab, "overlays", kind="xfs", size_mib=700) as folder:
        settings = f'[capture]\noverlay_dir = "{folder}"\nmin_overlay_free_mib = 400\n'
        vmsnap.policy(guest.name, default_policy(lab).replace("[capture]\n", settings))
        guest.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
        write = ["dd", "if=/dev/zero", "of=/var/tmp/much", "bs=1M", f"count={written_mib}", "conv=fsync"]
        address = guest.address()
        with unchanged(vmsnap, guest), ThreadPoolExecutor() as pool, vmsnap.start("backup", guest.name) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "restore clone" in line:
                    # Over SSH, which bears that the guest may stand still until its disk has room again.
                    writing = pool.submit(over_ssh, lab, address, write, timeout_s=120)
            process.wait(timeout=60 * lab.time_factor)
            said = "".join(lines)
            assert process.returncode == 3, said
            assert "overlays' file system" in said
            assert "capture.overlay_dir" in said
            assert writing.result().exit_status == 0, writing.result()
            assert vmsnap.ok("list", guest.name)["snapshots"] == []
        assert list(folder.iterdir()) == [], "no overlay is left"
    assert guest.run(["stat", "--format=%s", "/var/tmp/much"]).strip() == str(written_mib << 20)
    guest.psql("INSERT INTO markers VALUES (2)")
    assert guest.psql("SELECT n FROM markers ORDER BY n") == "1\n2"
    guest.run(["rm", "/var/tmp/much"])
    guest.run(["fstrim", "/"], timeout_s=60)
