"""The ladder's order, deadlines and reports, over rungs of the test's own; the addresses the old world speaks as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.errors import BugError, CancelledError, DeadlineError, DriverError, IsolationError, SafetyError, VmsnapError
from vmsnap.model.command import Command, CommandResult
from vmsnap.model.guest import OldAddress
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import DHCP_RUNGS, FencePlan, FencePort, Rung
from vmsnap.network.agentrung import AgentRung
from vmsnap.network.hotplug import HotPlug
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.oldaddress import gateway_of
from vmsnap.network.rungs import Dhcp, RungDriver, Timer
from vmsnap.ports.network import AddressRequest, LinkControl
from vmsnap.testing.fence_contract import fence_plan


@dataclass
class TestClock:
    """Time that passes when somebody sleeps."""

    __test__ = False
    seconds: float = 100.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, duration: timedelta) -> None:
        self.seconds += duration.total_seconds()


@dataclass
class Switch:
    on: bool = False

    def is_set(self) -> bool:
        return self.on

    def check(self) -> None:
        if self.on:
            raise CancelledError("cancelled")


class NoCables:
    def set_link(self, *, mac: str, up: bool) -> None:
        raise AssertionError

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        raise AssertionError


@dataclass
class ScriptedDhcp:
    """A DHCP service whose clone takes a lease once, at a time of the test's choice."""

    clock: TestClock
    speaks_at: float | None = None
    answers_at: float | None = None
    log: list[str] = field(default_factory=list)
    is_running: bool = False

    @property
    def messages(self) -> int:
        return int(self.is_running and self.speaks_at is not None and self.clock.seconds >= self.speaks_at)

    def start(self, ports: Sequence[FencePort] | None = None) -> None:
        self.is_running = True
        self.log.append("start")

    def stop(self) -> None:
        self.is_running = False
        self.log.append("stop")

    def withdraw(self) -> None:
        self.log.append("withdraw")

    def answering(self) -> str | None:
        return "198.18.0.10" if self.answers_at is not None and self.clock.seconds >= self.answers_at else None

    def missing(self) -> str:
        return "an answer"


def ladder(
    clock: TestClock, drivers: Mapping[Rung, RungDriver] | None = None, dhcp: ScriptedDhcp | None = None
) -> NetworkAddressing:
    service = dhcp or ScriptedDhcp(clock)
    return NetworkAddressing(clock=clock, drivers=drivers or {}, dhcp_for=lambda _: service)


@dataclass
class ScriptedRung:
    """A rung that takes its time and then works, fails, or waits until its deadline."""

    clock: TestClock
    result: str | VmsnapError | None
    seconds: float = 1.0
    timers: list[Timer] = field(default_factory=list)

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer, dhcp: Dhcp) -> str:
        self.timers.append(timer)
        self.clock.sleep(timedelta(seconds=self.seconds))
        while self.result is None:
            timer.tick(missing="nobody answered")
        if isinstance(self.result, VmsnapError):
            raise self.result
        return self.result


def request_for(*ladder: Rung) -> AddressRequest:
    return AddressRequest(
        fence=fence_plan(), ladder=ladder, old_addresses=(), probe_port=22, rung_deadline=timedelta(seconds=30)
    )


def test_rungs_are_tried_in_order_and_each_has_its_own_deadline() -> None:
    clock = TestClock()
    waiting, working = ScriptedRung(clock, None), ScriptedRung(clock, "10.0.0.1", seconds=2)
    never = ScriptedRung(clock, "10.0.0.2")
    addressing = ladder(clock, {Rung.LINK_FLAP: waiting, Rung.AGENT: working, Rung.OLD_ADDRESS: never})
    moved = addressing.move(
        request_for(Rung.FORCERENEW, Rung.LINK_FLAP, Rung.AGENT, Rung.OLD_ADDRESS), links=NoCables(), cancel=Switch()
    )
    assert (moved.rung, moved.address) == (Rung.AGENT, "10.0.0.1")
    assert [attempt.rung for attempt in moved.attempts] == [Rung.FORCERENEW, Rung.LINK_FLAP, Rung.AGENT]
    assert moved.attempts[0].failure is not None
    assert "not offered" in moved.attempts[0].failure
    assert moved.attempts[1].failure == "nobody answered"
    assert moved.attempts[1].seconds == pytest.approx(30, abs=0.1)
    assert moved.attempts[2].failure is None
    assert moved.seconds == pytest.approx(32.3, abs=0.1)
    assert never.timers == []


def test_where_no_rung_works_every_attempt_is_told() -> None:
    clock = TestClock()
    drivers = {
        Rung.LINK_FLAP: ScriptedRung(clock, DriverError("the cable is glued")),
        Rung.OLD_ADDRESS: ScriptedRung(clock, None),
    }
    with pytest.raises(DeadlineError) as raised:
        ladder(clock, drivers).move(request_for(Rung.LINK_FLAP, Rung.OLD_ADDRESS), links=NoCables(), cancel=Switch())
    assert raised.value.details == ("link-flap: the cable is glued (1.3 s)\nold-address: nobody answered (30.0 s)")
    assert raised.value.remedy


def test_rung_none_needs_no_address_and_ends_the_ladder() -> None:
    moved = ladder(TestClock()).move(request_for(Rung.NONE, Rung.LINK_FLAP), links=NoCables(), cancel=Switch())
    assert (moved.rung, moved.address) == (Rung.NONE, None)


@pytest.mark.parametrize("error", [IsolationError("a hole"), BugError("a bug"), CancelledError("stop")])
def test_some_errors_are_no_reason_to_try_the_next_rung(error: VmsnapError) -> None:
    clock = TestClock()
    following = ScriptedRung(clock, "10.0.0.1")
    drivers = {Rung.LINK_FLAP: ScriptedRung(clock, error), Rung.OLD_ADDRESS: following}
    with pytest.raises(type(error)):
        ladder(clock, drivers).move(request_for(Rung.LINK_FLAP, Rung.OLD_ADDRESS), links=NoCables(), cancel=Switch())
    assert following.timers == []


def test_a_cancelled_run_climbs_no_further() -> None:
    clock = TestClock()
    rung = ScriptedRung(clock, "10.0.0.1")
    with pytest.raises(CancelledError):
        ladder(clock, {Rung.LINK_FLAP: rung}).move(
            request_for(Rung.LINK_FLAP), links=NoCables(), cancel=Switch(on=True)
        )
    assert rung.timers == []


def test_a_timer_waits_no_longer_than_it_has() -> None:
    clock = TestClock()
    timer = Timer(clock=clock, cancel=Switch(), end=clock.monotonic() + 5)
    timer.wait(2)
    assert clock.monotonic() == pytest.approx(102, abs=0.01)
    timer.wait(60)
    assert clock.monotonic() == pytest.approx(105, abs=0.01)
    with pytest.raises(DeadlineError, match="the moon"):
        timer.tick(missing="the moon")
    with pytest.raises(CancelledError):
        Timer(clock=clock, cancel=Switch(on=True), end=1000).wait(1)


@settings(deadline=None)
@given(st.integers(1, 2**32 - 2), st.integers(1, 32))
def test_an_unknown_gateway_is_replaced_by_a_neighbour_that_is_not_the_guest(address: int, prefix: int) -> None:
    interface = IPv4Interface((address, prefix))
    chosen = gateway_of(OldAddress(interface=interface))
    assert chosen != interface.ip
    if prefix <= 31:
        assert chosen in interface.network
    if prefix < 31:
        assert chosen not in {interface.network.network_address, interface.network.broadcast_address}


def test_a_known_gateway_is_used() -> None:
    gateway = IPv4Address("10.9.8.254")
    assert gateway_of(OldAddress(interface=IPv4Interface("10.9.8.77/24"), gateway=gateway)) == gateway
    assert IPv4Network("10.9.8.0/24").supernet_of(IPv4Network(gateway))


def test_a_clone_that_moved_before_the_rung_is_credited_with_it() -> None:
    clock = TestClock()
    dhcp = ScriptedDhcp(clock, speaks_at=clock.seconds + 0.1, answers_at=clock.seconds + 1.5)
    rung = ScriptedRung(clock, "10.0.0.1")
    notes: list[str] = []
    moved = ladder(clock, {Rung.LINK_FLAP: rung}, dhcp).move(
        replace(request_for(Rung.LINK_FLAP), note=notes.append), links=NoCables(), cancel=Switch()
    )
    assert (moved.rung, moved.address) == (Rung.BY_ITSELF, "198.18.0.10")
    assert [item.rung for item in moved.attempts] == [Rung.BY_ITSELF]
    assert rung.timers == []
    assert dhcp.log == ["start"], "it goes on listening"
    assert notes[0] == "rung link-flap began"
    assert notes[1].startswith("rung by-itself worked after ")


def test_a_clone_that_moves_between_two_rungs_has_moved_by_itself() -> None:
    clock = TestClock()
    dhcp = ScriptedDhcp(clock, answers_at=clock.seconds + 2)
    first = ScriptedRung(clock, DriverError("not obeyed"), seconds=3)
    second = ScriptedRung(clock, "10.0.0.1")
    moved = ladder(clock, {Rung.FORCERENEW: first, Rung.LINK_FLAP: second}, dhcp).move(
        request_for(Rung.FORCERENEW, Rung.LINK_FLAP), links=NoCables(), cancel=Switch()
    )
    assert [(item.rung, item.failure) for item in moved.attempts] == [
        (Rung.FORCERENEW, "not obeyed"), (Rung.BY_ITSELF, None),
    ]  # fmt: skip
    assert second.timers == []


def test_a_clone_that_speaks_and_takes_nothing_costs_a_few_seconds_and_then_the_rung_is_climbed() -> None:
    clock = TestClock()
    moved = ladder(clock, {Rung.LINK_FLAP: ScriptedRung(clock, "10.0.0.1")}, ScriptedDhcp(clock, speaks_at=0)).move(
        request_for(Rung.LINK_FLAP), links=NoCables(), cancel=Switch()
    )
    assert moved.rung is Rung.LINK_FLAP
    assert moved.seconds < 8


def test_static_guests_go_straight_to_the_old_address() -> None:
    clock = TestClock()
    dhcp, never = ScriptedDhcp(clock), ScriptedRung(clock, "10.0.0.1")
    drivers = dict.fromkeys(DHCP_RUNGS, never) | {Rung.OLD_ADDRESS: ScriptedRung(clock, "192.0.2.7", seconds=0.5)}
    request = request_for(*Rung.__members__.values())
    plain = tuple(rung for rung in request.ladder if rung not in {Rung.NONE, Rung.BY_ITSELF})
    macs = frozenset(port.mac.upper() for port in request.fence.ports)
    moved = ladder(clock, drivers, dhcp).move(
        replace(request, ladder=plain, static_macs=macs), links=NoCables(), cancel=Switch()
    )
    assert moved.rung is Rung.OLD_ADDRESS
    assert moved.seconds == pytest.approx(0.5, abs=0.01)
    assert {item.failure for item in moved.attempts} == {"the guest's addresses are static", None}
    assert never.timers == []
    assert "start" not in dhcp.log


def test_one_nic_that_is_not_static_is_worth_every_rung() -> None:
    clock = TestClock()
    rung = ScriptedRung(clock, "10.0.0.1")
    request = replace(request_for(Rung.LINK_FLAP), fence=plan_of_two())
    static = frozenset({request.fence.ports[0].mac})
    moved = ladder(clock, {Rung.LINK_FLAP: rung}).move(
        replace(request, static_macs=static), links=NoCables(), cancel=Switch()
    )
    assert moved.rung is Rung.LINK_FLAP


def test_a_rung_may_have_a_deadline_of_its_own() -> None:
    clock = TestClock()
    drivers = {Rung.LINK_FLAP: ScriptedRung(clock, None), Rung.AGENT: ScriptedRung(clock, None)}
    with pytest.raises(DeadlineError) as raised:
        ladder(clock, drivers).move(
            replace(request_for(Rung.LINK_FLAP, Rung.AGENT), deadlines={Rung.AGENT: timedelta(seconds=7)}),
            links=NoCables(), cancel=Switch(),
        )  # fmt: skip
    assert raised.value.details == "link-flap: nobody answered (30.0 s)\nagent: nobody answered (7.0 s)"


@pytest.mark.parametrize("error", [DriverError("glued"), CancelledError("stop"), IsolationError("a hole")])
def test_whatever_ends_the_ladder_the_dhcp_service_is_stopped_and_takes_its_addresses_back(error: VmsnapError) -> None:
    clock = TestClock()
    dhcp = ScriptedDhcp(clock)
    with pytest.raises(VmsnapError):
        ladder(clock, {Rung.LINK_FLAP: ScriptedRung(clock, error)}, dhcp).move(
            request_for(Rung.LINK_FLAP), links=NoCables(), cancel=Switch()
        )
    assert dhcp.log == ["start", "stop", "withdraw"]


def test_a_rung_that_fails_is_told_to_the_journal_when_it_begins_and_ends() -> None:
    clock = TestClock()
    notes: list[str] = []
    drivers = {Rung.LINK_FLAP: ScriptedRung(clock, DriverError("glued")), Rung.OLD_ADDRESS: ScriptedRung(clock, "a")}
    ladder(clock, drivers).move(
        replace(request_for(Rung.LINK_FLAP, Rung.OLD_ADDRESS), note=notes.append), links=NoCables(), cancel=Switch()
    )
    assert notes == [
        "rung link-flap began",
        "rung link-flap ended after 1.3 s: glued",
        "rung old-address began",
        "rung old-address worked after 1.0 s: the clone answers at a",
    ]


def plan_of_two() -> FencePlan:
    return FencePlan.for_macs(RunId("00000000a1"), guest="db", macs=("52:54:00:00:00:01", "52:54:00:00:00:02"))


class Slots:
    """LinkControl that remembers what was replugged."""

    def __init__(self, error: VmsnapError | None = None) -> None:
        self.replugged: list[str] = []
        self.error = error

    def set_link(self, *, mac: str, up: bool) -> None:
        raise AssertionError

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        self.replugged.append(mac)
        if self.error is not None:
            raise self.error


def test_hot_plug_replugs_every_nic_of_a_fence_without_addresses() -> None:
    clock = TestClock()
    dhcp, slots = ScriptedDhcp(clock, answers_at=clock.seconds + 4), Slots()
    request = replace(request_for(Rung.HOT_PLUG), fence=plan_of_two())
    moved = ladder(clock, {Rung.HOT_PLUG: HotPlug()}, dhcp).move(request, links=slots, cancel=Switch())
    assert moved.rung is Rung.HOT_PLUG
    assert slots.replugged == [port.mac for port in request.fence.ports]
    assert dhcp.log == ["start", "withdraw"], "a fence is proven as it was built: without addresses"


def test_a_nic_that_does_not_come_back_ends_the_run_and_not_only_the_rung() -> None:
    clock = TestClock()
    never = ScriptedRung(clock, "10.0.0.1")
    with pytest.raises(SafetyError):
        ladder(clock, {Rung.HOT_PLUG: HotPlug(), Rung.OLD_ADDRESS: never}).move(
            request_for(Rung.HOT_PLUG, Rung.OLD_ADDRESS), links=Slots(SafetyError("gone")), cancel=Switch()
        )
    assert never.timers == []


class AgentedGuest:
    """A control of a guest in which some DHCP client runs."""

    method = "agent"

    def __init__(self, process: str, *, broken: frozenset[str] = frozenset()) -> None:
        self.process = process
        self.broken = broken
        self.asked: list[tuple[str, ...]] = []

    def ping(self, *, timeout: timedelta) -> None:
        return

    def close(self) -> None:
        return

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        argv = command.argv
        self.asked.append(argv)
        if argv[0] == "find":
            return CommandResult(exit_status=1, stdout=f"systemd\n{self.process}\n".encode())
        if argv[0] == "ls":
            return CommandResult(exit_status=0, stdout=b"eth0\nlo\n")
        if argv[0] == "cat":
            mac = "52:54:00:00:00:00" if "eth0" in argv[1] else "00:00:00:00:00:01"
            return CommandResult(exit_status=0, stdout=f"{mac}\n".encode())
        if argv[0] in self.broken:
            raise DeadlineError(f"{argv[0]} hangs")
        return CommandResult(exit_status=0)


@pytest.mark.parametrize(
    ("process", "commands"),
    [
        ("systemd-network", [("networkctl", "renew", "eth0"), ("networkctl", "reconfigure", "eth0")]),
        ("NetworkManager", [("nmcli", "--wait", "0", "device", "disconnect", "eth0"),
                            ("nmcli", "--wait", "0", "device", "connect", "eth0")]),
        ("dhcpcd", [("dhcpcd", "-n", "eth0")]),
        ("dhclient", [("dhclient", "-4", "-r", "eth0"), ("dhclient", "-4", "-nw", "eth0")]),
        ("udhcpc", [("pkill", "-USR2", "-x", "udhcpc"), ("pkill", "-USR1", "-x", "udhcpc")]),
    ],
)  # fmt: skip
def test_the_agent_is_given_the_commands_of_the_client_that_runs(process: str, commands: list[tuple[str, ...]]) -> None:
    clock = TestClock()
    guest = AgentedGuest(process)
    with pytest.raises(DeadlineError) as raised:
        ladder(clock, {Rung.AGENT: AgentRung()}).move(
            replace(request_for(Rung.AGENT), agent=guest), links=NoCables(), cancel=Switch()
        )
    assert guest.asked[4:] == commands
    assert "sent no DHCP message after" in (raised.value.details or "")


def test_a_command_that_hangs_does_not_keep_the_next_from_being_tried() -> None:
    clock = TestClock()
    dhcp = ScriptedDhcp(clock, answers_at=clock.seconds + 3)
    guest = AgentedGuest("dhclient", broken=frozenset({"dhclient"}))
    moved = ladder(clock, {Rung.AGENT: AgentRung()}, dhcp).move(
        replace(request_for(Rung.AGENT), agent=guest), links=NoCables(), cancel=Switch()
    )
    assert moved.rung is Rung.AGENT
    assert len(guest.asked) == 6


@pytest.mark.parametrize(("agent", "why"), [(None, "has no agent"), (AgentedGuest("pump"), "no DHCP client")])
def test_the_agent_rung_says_why_it_cannot_work(agent: AgentedGuest | None, why: str) -> None:
    with pytest.raises(DeadlineError) as raised:
        ladder(TestClock(), {Rung.AGENT: AgentRung()}).move(
            replace(request_for(Rung.AGENT), agent=agent), links=NoCables(), cancel=Switch()
        )
    assert why in (raised.value.details or "")
