"""Guests that are not as simple as one wishes: much of it in one guest, which is captured once for each trouble."""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest

from integration.lab import host_settings
from integration.lab.domain import DiskSpec, GuestSpec, random_mac
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import (
    HASTY,
    PATIENT,
    Cancel,
    DriverRun,
    capture_job_runs,
    definitions,
    is_running,
    run_of,
    wait_until,
)
from vmsnap.errors import GuestUnreachableError, NotConvergingError, VmsnapError
from vmsnap.guests.agent import AgentControl
from vmsnap.model.command import Command
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import Severity
from vmsnap.model.ids import new_run_id
from vmsnap.model.isolation import FencePlan
from vmsnap.model.journal import Resource
from vmsnap.ports.owner import Owner
from vmsnap.state.clock import SystemClock

TIMEOUT = timedelta(seconds=60)
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
TPM_STATES = Path("/var/lib/libvirt/swtpm")
ROOM_FOR_MEMORY = (
    "<maxMemory slots='4' unit='MiB'>4096</maxMemory>",
    "<cpu><numa><cell id='0' cpus='0-3' memory='512' unit='MiB'/></numa></cpu>",
)
VIRTIO_MEM = (
    "<memory model='virtio-mem'><target><size unit='MiB'>128</size><node>0</node><block unit='MiB'>2</block>"
    "<requested unit='MiB'>128</requested></target></memory>"
)
DIMM = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>"
# TPM2_PCR_Extend of PCR 16, the one for debugging, with an empty password and a SHA-256 of ones (TPM 2.0 Library, part 3).
EXTEND = bytes.fromhex("8002 00000041 00000182 00000010 00000009 40000009 0000 00 0000 00000001 000b" + "11" * 32)
PCR_16 = ("cat", "/sys/class/tpm/tpm0/pcr-sha256/16")
_PAGES = 256


@pytest.fixture(scope="module")
def awkward(lab: Lab) -> Iterator[LabGuest]:
    """Firmware with variables, a TPM, four buses, two formats, two NICs, one with queues, 4 vCPUs, memory added."""
    second_nic = (
        f"<interface type='bridge'><mac address='{random_mac()}'/><source bridge='{lab.bridge}'/>"
        "<model type='virtio'/><driver queues='4'/></interface>"
    )
    spec = GuestSpec(
        name=f"awkward-{secrets.token_hex(3)}",
        memory_mib=512,
        vcpus=4,
        nvram=True,
        disks=(
            DiskSpec(),
            DiskSpec(content="data", format="raw", bus="scsi"),
            DiskSpec(content="blank", blank_mib=16, bus="sata"),
            DiskSpec(content="blank", blank_mib=16, format="raw", bus="usb"),
        ),
        extra_devices=(
            TPM,
            VIRTIO_MEM,
            second_nic,
            "<controller type='scsi' model='virtio-scsi'/>",
            "<controller type='usb' model='qemu-xhci'/>",
        ),
        extra_domain=ROOM_FOR_MEMORY,
    )
    with LabGuest(lab, spec) as guest:
        # On this bus the disk may appear after the guest has looked for it.
        guest.run(["timeout", "60", "sh", "-c", "until mountpoint -q /data || mount /data; do sleep 0.5; done"])
        guest.domain.attachDeviceFlags(DIMM, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        yield guest


def control_of(run: DriverRun) -> AgentControl:
    """The clone's agent as a backup uses it."""
    assert run.clone is not None
    return AgentControl(run.driver.agent(run.clone.name), clock=SystemClock(), urgent=True)


def said_by(control: AgentControl, *argv: str) -> str:
    result = control.run(Command(argv=argv), timeout=TIMEOUT)
    assert result.exit_status == 0, result.error_text
    return result.text


def refusals(run: DriverRun) -> list[str]:
    found = run.driver.findings(run.plan.guest, settings=PATIENT)
    return [finding.message for finding in found if finding.severity is Severity.REFUSAL]


def added_memory(guest: LabGuest, *, domain: str) -> list[str]:
    """The models of the memory devices that a running domain has."""
    text = guest.connection.lookupByName(domain).XMLDesc()
    return sorted(model for model in ("dimm", "virtio-mem") if f"<memory model='{model}'" in text)


def test_a_guest_with_everything_frozen_at_the_instant_of_the_capture(lab: Lab, awkward: LabGuest) -> None:
    awkward.run(["sh", "-c", "echo before >/data/file && sync"])
    pcr = awkward.run(PCR_16)
    with run_of(lab, awkward) as run:
        assert refusals(run) == []
        before = definitions(awkward)
        run.prepare()
        awkward.agent("guest-fsfreeze-freeze")
        try:
            run.capture()
            # Whoever froze the guest still relies on it.
            assert awkward.agent("guest-fsfreeze-status") == "frozen"
        finally:
            awkward.agent("guest-fsfreeze-thaw")
        states = {path.name for path in TPM_STATES.iterdir()}
        clone = run.restore()
        assert {path.name for path in TPM_STATES.iterdir()} - states == {clone.uuid}
        assert added_memory(awkward, domain=clone.name) == ["dimm", "virtio-mem"]
        run.resume()
        command = "".join(f"\\{byte:03o}" for byte in EXTEND)
        awkward.run(["sh", "-c", f"printf '{command}' >/run/extend && cat /run/extend >/dev/tpm0"])
        awkward.run(["sh", "-c", "echo after >/data/file && sync"])

        control = control_of(run)
        said_by(control, "sh", "-c", "echo clone >/var/tmp/clone && sync")
        assert said_by(control, "cat", "/data/file") == "before\n"
        assert said_by(control, *PCR_16) == pcr
        assert awkward.run(PCR_16) != pcr
        assert said_by(control, "nproc") == "4\n"
        assert said_by(control, "sh", "-c", "ls /sys/class/net | grep -c eth") == "2\n"
        assert said_by(control, "sh", "-c", "ls -d /sys/class/net/eth1/queues/rx-* | wc -l") == "4\n"
        assert (
            run.driver.shut_down_clone(clone, agent_answers=True, deadline=timedelta(seconds=180), cancel=Cancel())
            == "guest agent"
        )
        with environment_of(run, awkward) as made:
            assert {path.name for path in TPM_STATES.iterdir()} == {*states, made}
        run.release()
        assert {path.name for path in TPM_STATES.iterdir()} == states
        assert definitions(awkward) == before
    assert awkward.exec(["test", "-e", "/var/tmp/clone"]).exit_status == 1
    assert awkward.run(["cat", "/data/file"]) == "after\n"


@contextmanager
def environment_of(run: DriverRun, guest: LabGuest) -> Iterator[str]:
    """A test VM over the clone's disks, started as far as its first instruction; yields its UUID."""
    driver = run.driver
    plan = EnvironmentPlan(
        run=new_run_id(),
        guest=guest.name,
        name=f"{guest.name}-test",
        uuid=str(uuid.uuid4()),
        macs=tuple(random_mac() for _ in run.plan.guest.nics),
        network=None,
    )
    fence = FencePlan.for_macs(plan.run, guest=guest.name, macs=plan.macs)
    machine = driver.machine(run.plan.guest)
    with ExitStack() as stack:

        def own(resource: Resource, owner: Owner) -> None:
            stack.callback(owner.release, resource, deadline=TIMEOUT)

        own(driver.environment_disks_resource(plan), driver)
        nvram = driver.clone_nvram(run.plan)
        driver.prepare_environment_disks(plan, images=driver.clone_images(run.plan), nvram=nvram)
        own(run.network.resource(fence), run.network)
        run.network.build(fence)
        own(driver.environment_resource(plan), driver)
        driver.define_environment(plan, machine=machine, fence=fence)
        driver.attach_environment(plan, machine=machine, fence=fence)
        yield plan.uuid


@contextmanager
def agent_stopped(guest: LabGuest, *, seconds: int) -> Iterator[None]:
    """Let the guest's agent be busy for a while: it takes requests, and answers none."""
    # It begins late enough that the agent still tells how this command ended.
    script = f"sleep 5; kill -STOP $(pidof qemu-ga); sleep {seconds}; kill -CONT $(pidof qemu-ga)"
    guest.run(["systemd-run", "--unit=lab-busy-agent", "--collect", "sh", "-c", script])
    wait_until(lambda: _is_silent(guest), "the silence of the agent", limit_s=30)
    yield
    guest.wait_for_agent()


def _is_silent(guest: LabGuest) -> bool:
    try:
        libvirt_qemu.qemuAgentCommand(guest.domain, '{"execute": "guest-ping"}', 5, 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
            raise
        return True
    return False


def test_a_guest_whose_agent_is_busy(lab: Lab, awkward: LabGuest) -> None:
    busy_s = 60
    began = time.monotonic()
    with agent_stopped(awkward, seconds=busy_s), run_of(lab, awkward) as run:
        assert refusals(run) == []
        run.prepare()
        run.capture()
        assert time.monotonic() - began < busy_s
        assert is_running(awkward)
        clone = run.restore()
        run.driver.resume_clone(clone, proof=run.network.prove(run.fence))
        with pytest.raises(GuestUnreachableError):
            control_of(run).ping(timeout=timedelta(seconds=2))
        # What kept the agent busy was captured with it, and ends in the clone as well.
        wait_until(lambda: _answers(run), "an answer of the clone's agent", limit_s=busy_s + 120)
        assert said_by(control_of(run), "echo", "alive") == "alive\n"


def _answers(run: DriverRun) -> bool:
    with suppress(VmsnapError):
        control_of(run).ping(timeout=timedelta(seconds=5))
        return True
    return False


@pytest.fixture(scope="module")
def on_huge_pages(lab: Lab) -> Iterator[LabGuest]:
    """A guest on huge pages of 2 MiB. The host's are raised by just as many as it needs, and given back afterwards."""
    more = host_settings.more_huge_pages(_PAGES)
    with host_settings.lent(more):
        assert int(more.path.read_text()) >= int(more.value), "the host's memory is in pieces: no huge pages can be had"
        backing = "<memoryBacking><hugepages/></memoryBacking>"
        with LabGuest(lab, GuestSpec(memory_mib=512, extra_domain=(backing,))) as guest:
            yield guest


def test_a_guest_on_huge_pages(lab: Lab, on_huge_pages: LabGuest) -> None:
    with run_of(lab, on_huge_pages) as run:
        assert refusals(run) == []
        run.prepare()
        run.capture()
        # There are none left for the clone, but for those that the host itself had.
        pages = host_settings.HUGE_PAGES.path
        assert int(pages.with_name("free_hugepages").read_text()) <= int(pages.read_text()) - _PAGES
        run.restore()
        run.resume()
        assert said_by(control_of(run), "echo", "alive") == "alive\n"


def test_a_guest_that_reboots_in_mid_capture(lab: Lab, on_huge_pages: LabGuest) -> None:
    guest = on_huge_pages
    boot_id = guest.run(["cat", "/proc/sys/kernel/random/boot_id"])
    before = definitions(guest)
    rebooted = threading.Event()

    def reboot_once() -> bool:
        """Asked by the capture again and again whether it shall end."""
        if capture_job_runs(guest) and not rebooted.is_set():
            rebooted.set()
            guest.agent("guest-exec", path="sh", arg=["-c", "echo b >/proc/sysrq-trigger"])
        return False

    with run_of(lab, guest, HASTY) as run:
        run.prepare()
        with suppress(NotConvergingError):  # taken or given up, both are well
            run.capture(Cancel(when=reboot_once))
        assert rebooted.is_set()
        assert is_running(guest)
    guest.wait_for_agent()
    assert definitions(guest) == before
    assert guest.run(["cat", "/proc/sys/kernel/random/boot_id"]) != boot_id
