"""The ladder's order, deadlines and reports, over rungs of the test's own; the addresses the old world speaks as."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.errors import BugError, CancelledError, DeadlineError, DriverError, IsolationError, VmsnapError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import Rung
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.oldaddress import gateway_of
from vmsnap.network.rungs import Timer
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


@dataclass
class ScriptedRung:
    """A rung that takes its time and then works, fails, or waits until its deadline."""

    clock: TestClock
    result: str | VmsnapError | None
    seconds: float = 1.0
    timers: list[Timer] = field(default_factory=list)

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer) -> str:
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
    addressing = NetworkAddressing(
        clock=clock, drivers={Rung.LINK_FLAP: waiting, Rung.AGENT: working, Rung.OLD_ADDRESS: never}
    )
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
    assert moved.seconds == pytest.approx(32, abs=0.1)
    assert never.timers == []


def test_where_no_rung_works_every_attempt_is_told() -> None:
    clock = TestClock()
    drivers = {
        Rung.LINK_FLAP: ScriptedRung(clock, DriverError("the cable is glued")),
        Rung.OLD_ADDRESS: ScriptedRung(clock, None),
    }
    with pytest.raises(DeadlineError) as raised:
        NetworkAddressing(clock=clock, drivers=drivers).move(
            request_for(Rung.LINK_FLAP, Rung.OLD_ADDRESS), links=NoCables(), cancel=Switch()
        )
    assert raised.value.details == ("link-flap: the cable is glued (1.0 s)\nold-address: nobody answered (30.0 s)")
    assert raised.value.remedy


def test_rung_none_needs_no_address_and_ends_the_ladder() -> None:
    moved = NetworkAddressing(clock=TestClock(), drivers={}).move(
        request_for(Rung.NONE, Rung.LINK_FLAP), links=NoCables(), cancel=Switch()
    )
    assert (moved.rung, moved.address) == (Rung.NONE, None)


@pytest.mark.parametrize("error", [IsolationError("a hole"), BugError("a bug"), CancelledError("stop")])
def test_some_errors_are_no_reason_to_try_the_next_rung(error: VmsnapError) -> None:
    clock = TestClock()
    following = ScriptedRung(clock, "10.0.0.1")
    drivers = {Rung.LINK_FLAP: ScriptedRung(clock, error), Rung.OLD_ADDRESS: following}
    with pytest.raises(type(error)):
        NetworkAddressing(clock=clock, drivers=drivers).move(
            request_for(Rung.LINK_FLAP, Rung.OLD_ADDRESS), links=NoCables(), cancel=Switch()
        )
    assert following.timers == []


def test_a_cancelled_run_climbs_no_further() -> None:
    clock = TestClock()
    rung = ScriptedRung(clock, "10.0.0.1")
    with pytest.raises(CancelledError):
        NetworkAddressing(clock=clock, drivers={Rung.LINK_FLAP: rung}).move(
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
