"""Backups on Hyper-V whose clones are to have an address: a responder joins the private switch for a while, and leaves it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest

from tests.workflow.invocations import backup, invoke, reconciling, recovers, simply, succeed
from vmsnap.errors import (
    DeadlineError,
    HostUnreachableError,
    IsolationError,
    PreconditionError,
    UnknownOutcomeError,
    VmsnapError,
)
from vmsnap.model.command import Command
from vmsnap.model.isolation import Rung
from vmsnap.model.policy import ControlPolicy, IsolationPolicy, Policy, SshPolicy
from vmsnap.model.report import BackupReport
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.hyperv import leases
from vmsnap.testing.hyperv.orphans import Orphanage
from vmsnap.testing.hyperv.values import DhcpClient, SwitchType, VirtualMachine, VMNetworkAdapter, VMState
from vmsnap.testing.hyperv.world import RESPONDER_VM, HyperVWorld

BOTH = (Rung.FORCERENEW, Rung.AGENT, Rung.LINK_FLAP, Rung.OLD_ADDRESS)


def asking(*ladder: Rung, address: Literal["auto", "always"] = "always") -> Policy:
    isolation = IsolationPolicy(address=address, ladder=ladder or BOTH, rung_deadline=timedelta(seconds=20))
    return Policy(guest="db", isolation=isolation)


def make(folder: Path, *, client: DhcpClient = DhcpClient.SENSES_LINK, serves: str = "198.18.7.") -> HyperVWorld:
    """Return an installation with a responder, whose guest knows the script that renews."""
    lab = HyperVWorld(folder)
    lab.machine.vm("db").network_adapters[0].client = client
    lab.add_responder(serves=serves)

    def learn(name: str, command: Command) -> None:
        if leases.is_asked(command):
            known = lab.host.machines[name].guest.extra
            known[command.argv] = leases.answer(lab.machine.vms, lab.machine.vm(name), command)

    lab.host.before_command = learn
    return lab


def responder(lab: HyperVWorld) -> VirtualMachine:
    return lab.machine.vm(RESPONDER_VM)


def is_clean(lab: HyperVWorld) -> list[str]:
    return [*(f"harm: {text}" for text in lab.host.harm()), *(f"left: {text}" for text in lab.machine.leftovers())]


@pytest.mark.parametrize(
    ("client", "ladder", "rung", "passed_over"),
    [
        (DhcpClient.SENSES_LINK, BOTH, Rung.AGENT, [Rung.FORCERENEW]),
        (DhcpClient.WHEN_TOLD, (Rung.LINK_FLAP, Rung.AGENT), Rung.AGENT, [Rung.LINK_FLAP]),
        (DhcpClient.SENSES_LINK, (Rung.HOT_PLUG, Rung.LINK_FLAP), Rung.LINK_FLAP, [Rung.HOT_PLUG]),
    ],
)
def test_a_clone_gets_an_address_of_its_own(
    tmp_path: Path, client: DhcpClient, ladder: tuple[Rung, ...], rung: Rung, passed_over: list[Rung]
) -> None:
    lab = make(tmp_path, client=client)
    report = succeed(lab, backup(asking(*ladder)))
    assert isinstance(report.result, BackupReport)
    isolation = report.result.isolation
    assert (isolation.rung, isolation.address) == (rung, "198.18.7.1")
    assert isolation.seconds > 0
    assert [item.rung for item in isolation.attempts if item.failure] == passed_over
    assert is_clean(lab) == []
    assert lab.machine.vm("db").network_adapters[0].ip_addresses == ("10.0.0.1",)


def test_a_clone_that_never_asks_is_late_and_the_attempts_say_why(tmp_path: Path) -> None:
    lab = make(tmp_path, client=DhcpClient.NONE)
    error = simply(lab, backup(asking())).error
    assert isinstance(error, DeadlineError)
    assert "hyperv.responder_vm" in str(error.remedy)
    for rung in BOTH:
        assert f"{rung}: " in str(error.details)
    assert lab.store.snapshots() == ()
    assert is_clean(lab) == []


def test_an_address_that_the_guest_had_in_production_is_none_of_its_own(tmp_path: Path) -> None:
    lab = make(tmp_path, serves="10.0.0.")
    error = simply(lab, backup(asking())).error
    assert isinstance(error, DeadlineError)
    assert is_clean(lab) == []


def _on_production(lab: HyperVWorld) -> None:
    lab.machine.connect_vm_network_adapter(vm_network_adapter=responder(lab).network_adapters[0], switch_name="LAN")
    lab.machine.violations.clear()


def _two_adapters(lab: HyperVWorld) -> None:
    responder(lab).network_adapters.append(VMNetworkAdapter(mac_address="00155D00FF02"))
    lab.machine.bind(adapter_of=responder(lab))


def _namesake(lab: HyperVWorld) -> None:
    lab.machine.add_vm(VirtualMachine(name=RESPONDER_VM))


REFUSED: dict[str, Callable[[HyperVWorld], object]] = {
    "it is on the switch LAN": _on_production,
    "2 network adapters": _two_adapters,
    "2 VMs called": _namesake,
    "its notes do not begin": lambda lab: setattr(responder(lab), "notes", "somebody's"),
    "it is Off": lambda lab: setattr(responder(lab), "state", VMState.OFF),
    "device of the host": lambda lab: setattr(responder(lab), "assigned_devices", 1),
    "it is reached by PowerShell Direct, or not at all": lambda lab: setattr(lab, "has_responder", False),
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_what_is_no_responder_is_refused_before_anything_is_touched(tmp_path: Path, words: str) -> None:
    lab = make(tmp_path)
    REFUSED[words](lab)
    lab.machine.calls.clear()
    error = simply(lab, backup(asking())).error
    assert isinstance(error, PreconditionError)
    assert words in error.brief
    assert error.remedy
    assert [call for call in lab.machine.calls if not call.startswith(("Get-", "Test-"))] == []


def test_ssh_is_refused_all_the_same(tmp_path: Path) -> None:
    lab = make(tmp_path)
    control = ControlPolicy(via="ssh", ssh=SshPolicy(key_file="/etc/vmsnap/key"))
    error = simply(lab, backup(asking().model_copy(update={"control": control}))).error
    assert isinstance(error, PreconditionError)
    assert "or not at all" in error.brief


def test_without_a_request_nobody_joins_the_switch(tmp_path: Path) -> None:
    lab = make(tmp_path)
    outcome = succeed(lab, backup(asking(address="auto")))
    assert isinstance(outcome.result, BackupReport)
    assert outcome.result.isolation.rung is Rung.NONE
    assert responder(lab).network_adapters[0].switch_id == ""
    assert is_clean(lab) == []


def _stranger(lab: HyperVWorld) -> None:
    (switch,) = (one for one in lab.machine.switches if one.switch_type is SwitchType.PRIVATE)
    stranger = lab.machine.add_vm(
        VirtualMachine(name="stranger", network_adapters=[VMNetworkAdapter(mac_address="00155D00EE01")])
    )
    stranger.network_adapters[0].switch_name, stranger.network_adapters[0].switch_id = switch.name, switch.id


@pytest.mark.parametrize("breach", [_two_adapters, _stranger])
def test_who_else_joins_while_the_responder_is_there_breaks_the_fence(
    tmp_path: Path, breach: Callable[[HyperVWorld], None]
) -> None:
    lab = make(tmp_path)
    done: list[str] = []

    def join(place: str) -> None:
        on_switch = responder(lab).network_adapters[0].connected
        if place == "disconnect_adapters: after" and on_switch and not done:
            done.append(place)
            breach(lab)

    lab.script = join
    error = simply(lab, backup(asking(Rung.LINK_FLAP))).error
    assert done
    assert isinstance(error, IsolationError), error
    assert lab.store.snapshots() == ()
    assert not [vm for vm in lab.machine.vms if vm.truth.origin]


@pytest.mark.parametrize("mode", [Mode.DIE_BEFORE, Mode.DIE_AFTER, Mode.FAIL_AFTER, Mode.CANCEL])
def test_a_fault_at_any_place_while_the_ladder_is_climbed(tmp_path: Path, mode: Mode) -> None:
    """Deaths and faults from the instant at which the responder is put on the switch until it has left."""
    good = invoke(make(tmp_path / "good"), backup(asking(Rung.LINK_FLAP, Rung.AGENT)))
    assert good.error is None
    places = [call.number for call in good.calls if "connect_adapters" in call.name or call.name == "addressing.move"]
    assert len(places) > 5
    problems, joined = [], 0
    for number in range(min(places), max(places) + 2):
        lab = make(tmp_path / f"{number}")
        outcome = invoke(lab, backup(asking(Rung.LINK_FLAP, Rung.AGENT)), Fault(call=number, mode=mode))
        joined += responder(lab).network_adapters[0].connected
        found = [f"harm: {text}" for text in lab.host.harm()]
        if mode not in DEATHS and not isinstance(outcome.error, None | VmsnapError | RuntimeError):
            found.append(f"ended with {outcome.error!r}")
        found += [*recovers(lab), *is_clean(lab)]
        problems += [f"{number}: {text}" for text in found]
    assert problems == []
    assert (joined > 5) == (mode in DEATHS)


def test_a_script_that_goes_on_when_its_client_is_dead_brings_nobody_together(tmp_path: Path) -> None:
    problems, places = [], []
    for number in range(1000):
        lab = make(tmp_path / f"{number}")
        lab.orphanage = Orphanage(lab.machine, number=number)
        outcome = invoke(lab, backup(asking(Rung.LINK_FLAP)))
        orphanage, lab.orphanage = lab.orphanage, None
        if not orphanage.place:
            assert outcome.error is None
            break
        places.append(orphanage.place)
        simply(lab, reconciling)
        orphanage.let_go()
        problems += [f"{orphanage.place}: {text}" for text in [*recovers(lab), *is_clean(lab)]]
    assert problems == []
    assert sum("Connect-VMNetworkAdapter" in place for place in places) == 3  # the clone, the responder, the flap


def test_another_runs_responder_is_waited_for_and_left_where_it_is(tmp_path: Path) -> None:
    lab = make(tmp_path)
    other = lab.machine.new_vm_switch(
        name="vmsnap-0123456789", switch_type=SwitchType.PRIVATE, notes="vmsnap fence 0123456789 \n"
    )
    adapter = responder(lab).network_adapters[0]
    lab.machine.connect_vm_network_adapter(vm_network_adapter=adapter, vm_switch=other)
    error = simply(lab, backup(asking())).error
    assert isinstance(error, DeadlineError)
    assert "vmsnap-0123456789 for another run" in error.brief
    assert adapter.switch_id == other.id
    looks = [0]

    def leave(place: str) -> None:
        looks[0] += place == "list_adapters: after"
        if looks[0] == 12:
            lab.machine.disconnect_vm_network_adapter(vm_network_adapter=adapter)

    lab.script = leave
    assert simply(lab, backup(asking())).error is None
    assert looks[0] > 12
    assert lab.host.harm() == []
    assert not adapter.connected


@pytest.mark.parametrize("error", [UnknownOutcomeError, HostUnreachableError])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(8))
def test_a_lost_answer_to_any_move_of_a_cable(
    tmp_path: Path, number: int, moment: str, error: type[VmsnapError]
) -> None:
    lab = make(tmp_path)
    moves: list[str] = []

    def lose(place: str) -> None:
        if place in {f"connect_adapters: {moment}", f"disconnect_adapters: {moment}"}:
            moves.append(place)
            if len(moves) == number + 1:
                raise error("no answer", remedy="this is a test")

    lab.script = lose
    outcome = simply(lab, backup(asking(Rung.LINK_FLAP, Rung.AGENT)))
    assert outcome.error is None or isinstance(outcome.error, VmsnapError)
    assert [*(f"harm: {text}" for text in lab.host.harm()), *recovers(lab), *is_clean(lab)] == []
    if outcome.error is None:
        assert len(lab.store.snapshots("db")) == 1
    assert moves
