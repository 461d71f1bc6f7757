"""What an operator gets wrong, and what the world does: each is refused or reported with what and what to do about it.

The source and the store stay as they were. Most of it needs no guest that has booted: a machine with a blank disk runs
all the same, and nothing in it answers.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote

import pytest

from integration.conftest import MakeGuest
from integration.installation import Installation, Outcome, default_policy
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.outside import file_system, fill
from integration.refusals import doctor_refusals, refused, require_refusal, ssh_section, unchanged
from vmsnap.hypervisors.libvirt.xml import child, drop, parse, unparse

TINY = (DiskSpec(content="blank", blank_mib=1),)
DISK_MIB = 64
NOBODY = "10.77.0.250"
ODD_NAMES = (
    "two words",
    'it\'s "quoted" $(id) `id`',
    "<name>&amp;",
    ".hidden",
    "a%2Fb.toml",
    "\N{LATIN SMALL LETTER U WITH DIAERESIS}nï \N{SNOWMAN} 数据库",
    "@latest",
)


@pytest.fixture(scope="module")
def silent(lab: Lab) -> Iterator[LabGuest]:
    """A guest that runs, has a channel for an agent, and in which nobody answers anything."""
    disks = (DiskSpec(content="blank", blank_mib=DISK_MIB),)
    guest = LabGuest(lab, GuestSpec(name="silent", memory_mib=64, disks=disks))
    try:
        # Its firmware finds nothing to boot and halts: it takes no CPU time from the guests that are captured.
        definition = parse(guest.xml)
        drop(child(definition, "os"), "kernel", "initrd", "cmdline")
        guest.connection.defineXML(unparse(definition)).create()
        yield guest
    finally:
        guest.remove()


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_guest_without_a_policy(silent: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy("silent-db")
    with unchanged(vmsnap, silent):
        refused(vmsnap, "backup", "silnet-db", code=3, names=("silnet-db",), remedy="did you mean 'silent-db'?")
        refused(vmsnap, "backup", "other", code=3, names=("other", "silent-db"), remedy="GUEST.toml")
        refused(vmsnap, "doctor", "silnet-db", code=3, names=("silnet-db",), remedy="did you mean 'silent-db'?")
        refused(vmsnap, "prune", "silnet-db", code=3, names=("silnet-db",), remedy="did you mean 'silent-db'?")


def test_a_guest_that_the_hypervisor_does_not_know(silent: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy("silant")
    with unchanged(vmsnap, silent):
        error = refused(vmsnap, "backup", "silant", code=3, names=("'silant'", "'silent'"), remedy="virsh list --all")
    assert error["class"] == "GuestNotFoundError"
    assert "did you mean 'silent'?" in error["remedy"]
    (finding,) = doctor_refusals(vmsnap, "silant")
    assert (finding["message"], finding["remedy"]) == (error["brief"], error["remedy"])


def test_odd_names_are_only_names(define_guest: MakeGuest, vmsnap: Installation, lab: Lab) -> None:
    guests = [define_guest(GuestSpec(name=name, disks=TINY)) for name in ODD_NAMES]
    for number, name in enumerate(ODD_NAMES):
        vmsnap.policy(f"odd-{number}", f"guest = {json.dumps(name)}\n{default_policy(lab)}")
    checks = vmsnap.ok("policy", "check")["files"]
    assert sorted(item["guest"] for item in checks) == sorted(ODD_NAMES)
    with unchanged(vmsnap, *guests):
        for name in ODD_NAMES:
            error = refused(vmsnap, "backup", name, code=3, names=(repr(name), "shut off"), remedy="virsh start")
            assert f"virsh start {quote(name)};" in error["remedy"]
        for name in ODD_NAMES[1:3]:
            assert [item["check"] for item in doctor_refusals(vmsnap, name)] == ["state"]
            assert vmsnap.ok("policy", "show", name)["guest"] == name
        assert vmsnap.ok("list", name)["snapshots"] == []
        plain = vmsnap.run("backup", name)
    assert plain.exit_code == 3
    assert "vmsnap: what to do:" in plain.stderr
    assert "\x1b" not in plain.stderr


def test_a_name_that_looks_like_an_option(define_guest: MakeGuest, vmsnap: Installation, lab: Lab) -> None:
    guest = define_guest(GuestSpec(name="--dash", disks=TINY))
    vmsnap.policy("odd", f'guest = "--dash"\n{default_policy(lab)}')
    program, *_ = vmsnap.argv()
    argv = [program, "--config", str(vmsnap.config), "--json", "backup", "--", "--dash"]
    with unchanged(vmsnap, guest):
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60 * lab.time_factor)
    outcome = Outcome(argv=tuple(argv), exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)
    require_refusal(outcome, code=3, names=("'--dash'",), remedy="virsh start")


def test_a_slash_leads_nowhere(vmsnap: Installation, lab: Lab) -> None:
    # libvirt lets no guest have such a name; a policy and a command line may.
    around = sorted(vmsnap.folder.parent.iterdir())
    with unchanged(vmsnap):
        for name in ("a/b", "../../../outside", "/etc/passwd", ".."):
            vmsnap.policy("odd", f"guest = {json.dumps(name)}\n{default_policy(lab)}")
            refused(vmsnap, "backup", name, code=3, names=(name,), remedy="virsh list", kind="GuestNotFoundError")
            assert vmsnap.ok("prune", name)["decisions"] == []
        assert vmsnap.ok("list", name)["snapshots"] == []
        refused(vmsnap, "provision", f"{name}@latest", code=3, names=(name,), remedy="vmsnap list")
        refused(vmsnap, "env", "destroy", "../x", code=3, names=("'../x'",), remedy="vmsnap provision")
    assert sorted(vmsnap.folder.parent.iterdir()) == around


def test_snapshots_and_environments_that_are_not_there(vmsnap: Installation) -> None:
    with unchanged(vmsnap):
        for command in (("show",), ("pin", "--reason", "why"), ("provision",)):
            refused(vmsnap, *command, "deadbeef00", code=3, names=("deadbeef00",), remedy="vmsnap list")
        refused(vmsnap, "env", "extend", "nobody", "--ttl", "1h", code=3, names=("nobody",), remedy="vmsnap provision")
        refused(vmsnap, "provision", "db", "--ttl", "soon", code=2, names=("--ttl", "soon"), remedy="")
        refused(vmsnap, "provision", "db", "--at", "yesterday", code=2, names=("--at", "yesterday"), remedy="")


# --- the guest --------------------------------------------------------------------------------------------------------


def test_a_stopped_guest(define_guest: MakeGuest, vmsnap: Installation) -> None:
    guest = define_guest(GuestSpec(name="stopped", disks=TINY))
    vmsnap.policy(guest.name)
    with unchanged(vmsnap, guest):
        error = refused(vmsnap, "backup", guest.name, code=3, names=("'stopped'", "off"), remedy="virsh start stopped")
    assert error["class"] == "PreconditionError"


def test_a_paused_guest(silent: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(silent.name)
    silent.domain.suspend()
    try:
        with unchanged(vmsnap, silent):
            error = refused(vmsnap, "backup", silent.name, code=3, names=("'silent'", "paused"), remedy="virsh resume")
        (finding,) = doctor_refusals(vmsnap, silent.name)
        assert finding["remedy"] == error["remedy"]
    finally:
        silent.domain.resume()


def test_doctor_says_what_backup_says(define_guest: MakeGuest, vmsnap: Installation, lab: Lab) -> None:
    shared = f"<filesystem type='mount'><source dir='{lab.scratch}'/><target dir='host'/></filesystem>"
    fixed_cid = "<vsock model='virtio'><cid auto='no' address='3'/></vsock>"
    user_net = "<interface type='user'><mac address='52:54:00:00:00:77'/></interface>"
    guest = define_guest(GuestSpec(name="tied", disks=TINY, extra_devices=(shared, fixed_cid, user_net)))
    vmsnap.policy(guest.name)
    with unchanged(vmsnap, guest):
        error = refused(
            vmsnap, "backup", guest.name, code=3, names=("virtiofs or 9p", "vsock", "'user'"), remedy="virsh"
        )
        findings = doctor_refusals(vmsnap, guest.name)
    assert len(findings) == 4
    for item in findings:
        assert item["remedy"]
        assert f"{item['check']}: {item['message']}\n  -> {item['remedy']}" in error["details"]


# --- no way in --------------------------------------------------------------------------------------------------------


def test_no_agent_and_no_ssh(silent: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    vmsnap.policy(silent.name)
    with unchanged(vmsnap, silent):
        error = refused(vmsnap, "backup", silent.name, code=3, names=("'silent'",), remedy="qemu-guest-agent")
        assert "[control.ssh]" in error["remedy"]
        (finding,) = doctor_refusals(vmsnap, silent.name)
        assert (finding["message"], finding["remedy"]) == (error["brief"], error["remedy"])
        text = default_policy(lab).replace("[control]\n", '[control]\nvia = "agent"\n')
        vmsnap.policy(silent.name, text + ssh_section(lab))
        refused(vmsnap, "backup", silent.name, code=3, names=("'silent'",), remedy="control.via")


def test_ssh_to_an_unknown_address_and_to_nobody(silent: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    vmsnap.policy(silent.name, default_policy(lab) + ssh_section(lab))
    with unchanged(vmsnap, silent):
        refused(vmsnap, "backup", silent.name, code=3, names=("'silent'",), remedy="isolation.old_address")
        extra = f'[isolation]\nold_address = "{NOBODY}/24"\n'
        vmsnap.policy(silent.name, default_policy(lab) + ssh_section(lab, extra=extra))
        error = refused(vmsnap, "backup", silent.name, code=3, names=(NOBODY,), remedy="host_key")
        (finding,) = doctor_refusals(vmsnap, silent.name)
        assert finding["message"] == error["brief"]


def _no_key(_: Path) -> None:
    """Leave nothing there."""


def _open_key(path: Path) -> None:
    path.write_text("secret\n")
    path.chmod(0o644)


def _garbage(path: Path) -> None:
    path.write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n\xff\xfe\x00rubbish\n")
    path.chmod(0o600)


def _locked_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "words", "-f", str(path)], check=True, timeout=60)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "says", "remedy"),
    [
        (_no_key, "No such file", "key_file"),
        (_open_key, "others may read", "chmod 600"),
        (_garbage, "no private SSH key", "ssh-keygen"),
        (_locked_key, "passphrase", "ssh-keygen"),
        (_folder, "is no file", "key_file"),
    ],
)
def test_a_key_file_that_is_of_no_use(
    silent: LabGuest, vmsnap: Installation, lab: Lab, make: Callable[[Path], None], says: str, remedy: str
) -> None:
    key = vmsnap.folder / "key"
    make(key)
    extra = f'[isolation]\nold_address = "{NOBODY}/24"\n'
    vmsnap.policy(silent.name, default_policy(lab) + ssh_section(lab, key_file=key, extra=extra))
    with unchanged(vmsnap, silent):
        error = refused(vmsnap, "backup", silent.name, code=2, names=(str(key), says), remedy=remedy)
    assert "secret" not in json.dumps(error)


# --- room and file systems --------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there(silent: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(silent.name)
    vmsnap.store /= "nowhere"
    vmsnap.write_config()
    error = refused(vmsnap, "backup", silent.name, code=3, names=(str(vmsnap.store),), remedy="reflinks")
    assert "No such file" in error["brief"]
    assert not vmsnap.store.exists()
    assert any(str(vmsnap.store) in item["message"] for item in doctor_refusals(vmsnap, silent.name))


def test_a_full_store(silent: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    vmsnap.policy(silent.name)
    with file_system(lab, "full-store", kind="xfs", size_mib=320) as folder:
        fill(folder, leave_mib=DISK_MIB // 2)
        vmsnap.store = folder
        vmsnap.write_config()
        with unchanged(vmsnap, silent):
            needed = f"{DISK_MIB << 20:,}"
            refused(vmsnap, "backup", silent.name, code=3, names=(str(folder), needed), remedy="vmsnap prune")
            assert any(needed in item["message"] for item in doctor_refusals(vmsnap, silent.name))


def test_a_store_without_reflinks(silent: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    vmsnap.policy(silent.name)
    with file_system(lab, "plain-store", kind="ext4", size_mib=256) as folder:
        vmsnap.store = folder
        vmsnap.write_config()
        with unchanged(vmsnap, silent):
            error = refused(
                vmsnap, "backup", silent.name, code=3, names=(str(folder), "no reflinks"), remedy="mkfs.xfs"
            )
            assert "allow_copies" in error["remedy"]
            vmsnap.write_config(extra="allow_copies = true")
            # Now nothing is wrong with the store; the next obstacle is that nobody answers.
            refused(vmsnap, "backup", silent.name, code=3, names=("'silent'",), remedy="qemu-guest-agent")


def test_overlay_folders_that_are_missing_or_full(silent: LabGuest, vmsnap: Installation, lab: Lab) -> None:
    def policy(folder: Path) -> str:
        return default_policy(lab).replace("[capture]\n", f'[capture]\noverlay_dir = "{folder}"\n')

    missing = vmsnap.folder / "overlays"
    vmsnap.policy(silent.name, policy(missing))
    with unchanged(vmsnap, silent):
        refused(vmsnap, "backup", silent.name, code=3, names=(str(missing), "No such file"), remedy="make the folder")
        with file_system(lab, "full-overlays", kind="xfs", size_mib=320) as folder:
            vmsnap.policy(silent.name, policy(folder))
            error = refused(vmsnap, "backup", silent.name, code=3, names=(str(folder), "MiB free"), remedy="make room")
            assert "min_overlay_free_mib is 1024" in error["remedy"]
            assert doctor_refusals(vmsnap, silent.name)[0]["remedy"] == error["remedy"]
            assert list(folder.iterdir()) == []


# --- files ------------------------------------------------------------------------------------------------------------

BAD_POLICIES = {
    "typo": ('[capture]\nmax_pauze = "1s"\n', (":2:", "capture.max_pauze", "did you mean 'max_pause'?", "timeout")),
    "section": ("\n[captures]\n", (":2:", "captures", "did you mean 'capture'?", "retention")),
    "number": ('[retention]\nkeep_last = "7"\n', (":2:", "retention.keep_last", '"7"', "without quotes")),
    "zero": ("[retention]\nkeep_last = 0\n", (":1:", "retention", "keep_last must be at least 1")),
    "zone": ('time_zone = "Europe/Berlim"\n', (":1:", "time_zone", "did you mean 'Europe/Berlin'?")),
    "truth": ('enabled = "yes"\n', (":1:", "enabled", '"yes"', "true or false")),
    "choice": ('[capture]\nmode = "lives"\n', (":2:", "capture.mode", '"lives"', "did you mean 'live'?")),
    "rung": ('[isolation]\nladder = ["link-flop"]\n', (":2:", "isolation.ladder[1]", "did you mean 'link-flap'?")),
    "duration": ("[clone]\nboot_deadline = 5\n", (":2:", "clone.boot_deadline", "given 5", '"90s"')),
    "address": ('[isolation]\nold_address = "10.0.0"\n', (":2:", "isolation.old_address", "192.0.2.10/24")),
    "absent": ('[control]\nvia = "ssh"\n', (":1", "control", "[control.ssh]", "key_file")),
    "syntax": ("[capture\nmax_pause = 1\n", (":1:", "not valid TOML")),
    "twice": ('guest = "once"\n', ("once.toml", "twice.toml")),
}


def test_policies_with_mistakes(silent: LabGuest, vmsnap: Installation) -> None:
    folder = vmsnap.folder / "policies"
    for name, (text, _) in BAD_POLICIES.items():
        vmsnap.policy(name, text)
    vmsnap.policy("once")
    (folder / "bytes.toml").write_bytes(b'# \xff\nguest = "bytes"\n')
    vmsnap.policy(silent.name)
    outcome = vmsnap.run("policy", "check", "--json")
    assert outcome.exit_code == 2, outcome.explain()
    errors = {Path(item["file"]).stem: item["error"] for item in outcome.document["files"]}
    assert errors.pop("silent") is None, "a broken file stops its own guest and no other"
    assert "not UTF-8" in errors.pop("bytes")["brief"]
    assert "twice.toml" in errors.pop("once")["brief"]
    assert errors.keys() == BAD_POLICIES.keys()
    for name, (_, words) in BAD_POLICIES.items():
        said = errors[name]["brief"]
        assert [word for word in words if word not in said] == [], said
        assert str(folder / f"{name}.toml") in said
        assert errors[name]["remedy"]
    with unchanged(vmsnap, silent):
        error = refused(vmsnap, "backup", "typo", code=2, names=BAD_POLICIES["typo"][1], remedy="vmsnap policy check")
        assert error["class"] == "ConfigError"
        refused(vmsnap, "doctor", "number", code=2, names=BAD_POLICIES["number"][1], remedy="vmsnap policy check")
        vmsnap.policy("long", f'guest = "{"x" * 300}"\n')
        refused(vmsnap, "backup", "x" * 300, code=2, names=("long.toml:1:", "at most 255"), remedy="policy check")


def test_a_configuration_with_mistakes(vmsnap: Installation) -> None:
    cases = {
        "[stor]\n": ("stor", "did you mean 'store'?"),
        '[store]\npath = "relative"\n': (":2:", "store.path", "absolute"),
        "[store]\npath = 7\n": (":2:", "store.path", "7"),
        '[store]\npath = "/x"\nallow_copies = "yes"\n': (":3:", "store.allow_copies", "true or false"),
    }
    for text, words in cases.items():
        vmsnap.config.write_text(text)
        refused(vmsnap, "list", code=2, names=(str(vmsnap.config), *words), remedy="correct the file")
    vmsnap.config.write_text('[store]\npath = "/x"\n')
    vmsnap.config.chmod(0o666)
    refused(vmsnap, "list", code=2, names=(str(vmsnap.config), "0666"), remedy="chmod o-w")
    vmsnap.config.unlink()
    refused(vmsnap, "list", code=2, names=(str(vmsnap.config),), remedy="[store]")
