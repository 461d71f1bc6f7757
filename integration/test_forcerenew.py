"""FORCERENEW against real DHCP clients, each in a namespace that plays the clone.

No DHCP server in Debian hands out nonces (RFC 6704), so the production server here is vmsnap's own responder in a
namespace of its own. What is known of the last exchange is what the watcher saw on production's bridge.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from integration.dhcp_clients import CLIENTS, Client
from integration.networld import StandIn, SwitchCancel, fresh_network, sh
from integration.test_addressing import GATEWAY, MAC, OLD, PORT, Fenced, Worlds, greeting
from integration.waiting import wait_until
from vmsnap.dhcp.authentication import ReplayCounter, authentication_of, is_signed
from vmsnap.dhcp.message import DhcpMessage, MessageType, OptionCode, decode
from vmsnap.dhcp.pool import DEFAULT_POOL
from vmsnap.dhcp.responder import Lease, Responder, ResponderConfig
from vmsnap.errors import CancelledError, DeadlineError
from vmsnap.model.isolation import Addressed, Exchange, FencePort, Rung
from vmsnap.network import links, netns, readback
from vmsnap.network.forcerenew import ForceRenew
from vmsnap.network.frames import ETHERTYPE_IPV4, Datagram, Frame, parse_mac, vlan_tag
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.packets import PacketSocket
from vmsnap.network.responder import FenceResponder, reply_frame
from vmsnap.network.vlans import VlanLink, vlan_link_name
from vmsnap.network.watcher import DhcpWatcher, Watched
from vmsnap.ports.network import AddressRequest
from vmsnap.state.clock import SystemClock
from vmsnap.state.exchanges import FileExchanges

SERVER = IPv4Address("10.9.8.2")  # not the gateway
REPLAY_SECONDS = 1000.0
LIMIT_SECONDS = 8
ONCE = (0.8,)
BULK = bytes(range(256)) * 4000
BULK_PORT = 2223
ECHO = (
    "import socket\n"
    f"s = socket.create_server(('0.0.0.0', {BULK_PORT}))\n"
    "c, _ = s.accept()\n"
    "while data := c.recv(1 << 16):\n"
    "    c.sendall(data)\n"
)


class Production:
    """A production network with a DHCP server of RFC 6704 that knows one guest, and a watcher on its bridge."""

    def __init__(self, folder: Path) -> None:
        sh("ip", "link", "add", "prod", "type", "bridge")
        sh("ip", "link", "set", "prod", "up")
        self.machine = StandIn()
        self.machine.plug("prod0", bridge="prod")
        self.machine.run("ip", "addr", "add", f"{SERVER}/24", "dev", "eth0")
        config = ResponderConfig(
            server=SERVER, network=IPv4Network("10.9.8.0/24"), pool=(OLD.interface.ip,), router=GATEWAY
        )
        self.server = Responder(config, replay=ReplayCounter(wall_seconds=lambda: REPLAY_SECONDS))
        self.responder = FenceResponder(self.machine.namespace, interface="eth0", responder=self.server)
        self.book = FileExchanges(folder / "state")
        watched = Watched(macs=frozenset({MAC}), interfaces=frozenset({"prod"}))
        self.watcher = DhcpWatcher(self.book, look=lambda: watched, tell=lambda _: None)
        self.cancel = SwitchCancel()
        self.watching = threading.Thread(target=lambda: self.watcher.run(cancel=self.cancel))
        self.watching.start()
        wait_until(
            lambda: "promiscuity 1" in sh("ip", "-d", "link", "show", "prod"), seconds=5, what="the watcher's socket"
        )
        self.responder.start()

    def lease(self) -> Lease:
        lease = self.responder.heard(parse_mac(MAC)).lease
        assert lease is not None
        return lease

    def exchange(self) -> Exchange:
        """Return what was seen of the last exchange: what the server knows, and no less."""
        lease = self.lease()
        wait_until(lambda: self._seen_xid() == lease.xid, seconds=5, what="the exchange in the watcher's book")
        seen = self.book.get(MAC)
        assert seen is not None
        assert (seen.address, seen.server, seen.nonce) == (lease.address, SERVER, lease.nonce)
        return seen

    def _seen_xid(self) -> int | None:
        seen = self.book.get(MAC)
        return None if seen is None else seen.xid

    def force_renew(self) -> int:
        """Ask the client to renew, as any server of RFC 6704 may; return the replay value, which the client believed."""
        before = self.lease().xid
        asked = self.server.force_renew(parse_mac(MAC), now=time.monotonic())
        assert asked is not None
        proof = authentication_of(asked.message)
        assert proof is not None
        with netns.inside(self.machine.namespace, action=lambda: PacketSocket("eth0")) as packets:
            packets.send(reply_frame(asked, mac=packets.mac))
        wait_until(lambda: self.lease().xid != before, seconds=10, what="a renewal")
        return proof.replay

    def close(self) -> None:
        self.cancel.on = True
        self.watching.join(5)
        assert not self.watching.is_alive()
        self.responder.stop()
        self.machine.close()


class Dhcpcd(Client):
    """dhcpcd with its defaults, but for lines of the test's own. By default it probes an address for five seconds."""

    def __init__(self, clone: StandIn, folder: Path, *lines: str, interface: str = "eth0") -> None:
        super().__init__(clone, folder)
        self.lines = lines
        self.interface = interface

    def start(self) -> subprocess.Popen[bytes]:
        config = self.folder / "dhcpcd.conf"
        config.write_text("\n".join(("noipv6", "nohook resolv.conf, hostname, timesyncd", *self.lines, "")))
        script = (
            "mount -t tmpfs none /run && mount -t tmpfs none /var/lib && mkdir /run/dhcpcd /var/lib/dhcpcd && "
            f"exec /usr/sbin/dhcpcd -4 -B -d -f {config} {self.interface} >{self.folder}/log 2>&1"
        )
        return self.clone.start("unshare", "--mount", "sh", "-c", script)


@pytest.fixture
def worlds() -> Iterator[Worlds]:
    with fresh_network():
        made = Worlds()
        yield made
        made.close()


@pytest.fixture
def production(worlds: Worlds, tmp_path: Path) -> Iterator[Production]:
    made = Production(tmp_path)
    yield made
    made.close()


def boot(worlds: Worlds, client: Client) -> Fenced:
    """Boot a machine in production; return it as a clone, its memory and its lease in a fence."""
    worlds.keep(client.start())
    wait_until(lambda: client.clone.addresses() == ["10.9.8.77"], seconds=30, what="a production lease")
    return worlds.around(client.clone)


def machine(worlds: Worlds) -> StandIn:
    made = worlds.machine()
    made.plug("guest0", mac=MAC, bridge="prod")
    return made


def carrier_changes(clone: StandIn) -> int:
    script = "mount -t sysfs none /sys && cat /sys/class/net/eth0/carrier_changes"
    return int(clone.run("unshare", "--mount", "sh", "-c", script))


def request_for(world: Fenced, *ladder: Rung, exchanges: tuple[Exchange, ...]) -> AddressRequest:
    return AddressRequest(
        fence=world.plan, ladder=ladder, old_addresses=(OLD,), probe_port=PORT, rung_deadline=timedelta(seconds=45),
        exchanges=exchanges,
    )  # fmt: skip


class Fixed(ReplayCounter):
    """A counter that does not count."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def next(self) -> int:
        return self.value


def move(world: Fenced, *ladder: Rung, exchanges: tuple[Exchange, ...], rung: ForceRenew | None = None) -> Addressed:
    drivers = None if rung is None else {Rung.FORCERENEW: rung}
    with NetworkAddressing(clock=SystemClock(), drivers=drivers) as addressing:
        request = request_for(world, *ladder, exchanges=exchanges)
        moved = addressing.move(request, links=world.cables, cancel=SwitchCancel())
        assert moved.address is not None
        assert greeting(world.plan, moved.address) == "clone"
        assert moved.address in world.clone.addresses()
        return moved


@pytest.mark.parametrize("lines", [("noarp",), ()], ids=["no ARP probes", "ARP probes"])
def test_a_signed_forcerenew_moves_dhcpcd_in_time_and_without_carrier_loss(
    lines: tuple[str, ...], worlds: Worlds, production: Production, tmp_path: Path
) -> None:
    world = boot(worlds, Dhcpcd(machine(worlds), tmp_path, *lines))
    exchange = production.exchange()
    assert exchange.nonce is not None
    before = carrier_changes(world.clone)
    moved = move(world, Rung.FORCERENEW, exchanges=(exchange,))
    print(f"dhcpcd {' '.join(lines) or 'with ARP probes'}: signed FORCERENEW {moved.seconds:.2f} s")
    assert moved.rung is Rung.FORCERENEW
    assert moved.seconds < LIMIT_SECONDS
    assert IPv4Address(str(moved.address)) in DEFAULT_POOL
    assert carrier_changes(world.clone) == before
    assert world.cables.events == []


def test_dhcpcd_is_moved_neither_by_a_repetition_nor_by_another_exchange_nor_by_another_nonce(
    worlds: Worlds, production: Production, tmp_path: Path
) -> None:
    guest = machine(worlds)
    worlds.keep(Dhcpcd(guest, tmp_path, "noarp").start())
    wait_until(lambda: guest.addresses() == ["10.9.8.77"], seconds=30, what="a production lease")
    first = production.exchange()
    used = production.force_renew()
    right = production.exchange()
    assert right.xid != first.xid
    assert right.nonce is not None
    assert right.nonce == first.nonce
    world = worlds.around(guest)
    log = tmp_path / "log"
    failed = "authentication failed"
    wrong: list[tuple[str, Exchange, ReplayCounter | None]] = [
        (failed, right, Fixed(used)),
        (failed, replace(right, nonce=bytes(16)), None),
        ("unauthenticated Force Renew", replace(right, nonce=None), None),
        ("", first, None),  # of another exchange: not worth a line in the log
        ("", replace(right, xid=right.xid ^ 1), None),
    ]
    for reason, exchange, replay in wrong:
        begun = len(log.read_text())
        rung = ForceRenew(spacing_seconds=ONCE, replay=replay)
        with pytest.raises(DeadlineError) as raised:
            move(world, Rung.FORCERENEW, exchanges=(exchange,), rung=rung)
        assert "did not obey FORCERENEW" in str(raised.value.details)
        said = log.read_text()[begun:]
        assert reason in said if reason else said == ""
        assert world.clone.addresses() == ["10.9.8.77"]
        worlds.fence.prove(world.plan)  # nothing is left of the attempt
    # The same client, the same fence, and what is right: it was not deaf.
    moved = move(world, Rung.FORCERENEW, exchanges=(right,), rung=ForceRenew(spacing_seconds=ONCE))
    assert moved.seconds < LIMIT_SECONDS


def test_an_unsigned_forcerenew_moves_a_dhcpcd_that_needs_no_authentication(
    worlds: Worlds, production: Production, tmp_path: Path
) -> None:
    world = boot(worlds, Dhcpcd(machine(worlds), tmp_path, "noarp", "noauthrequired"))
    moved = move(world, Rung.FORCERENEW, exchanges=(replace(production.exchange(), nonce=None),))
    print(f"dhcpcd noauthrequired: unsigned FORCERENEW {moved.seconds:.2f} s")
    assert moved.seconds < LIMIT_SECONDS


def test_a_dhcpcd_behind_a_vlan_tag_is_moved_and_reached_inside_its_vlan(
    worlds: Worlds, production: Production, tmp_path: Path
) -> None:
    guest = machine(worlds)
    card = FencePort(index=0, mac=MAC, bridge="", tap="", veth_host="", veth_inside="eth0")
    vlan = VlanLink(guest.namespace, port=card, tags=(vlan_tag(42),))
    vlan.open()
    try:
        guest.run("ip", "link", "set", vlan.name, "address", MAC)
        worlds.keep(guest.start("python3", "-c", ECHO))
        worlds.keep(Dhcpcd(guest, tmp_path, "noarp", interface=vlan.name).start())
        wait_until(lambda: guest.addresses(vlan.name) == ["10.9.8.77"], seconds=30, what="a production lease")
        exchange = production.exchange()
        assert exchange.vlan == 42
        world = worlds.around(guest)
        with NetworkAddressing(clock=SystemClock()) as addressing:
            request = request_for(world, Rung.FORCERENEW, exchanges=(exchange,))
            moved = addressing.move(request, links=world.cables, cancel=SwitchCancel())
            print(f"dhcpcd in a VLAN: signed FORCERENEW {moved.seconds:.2f} s")
            assert moved.address in guest.addresses(vlan.name)
            assert guest.addresses("eth0") == []
            assert greeting(world.plan, str(moved.address)) == "clone"
            assert readback.changes(world.plan) == ()  # nothing that would alarm who watches the fence
            ours = worlds.fence.connector(world.plan)(str(moved.address), BULK_PORT, timedelta(seconds=3))
            with ours:  # more than one frame, both ways, by cards that leave checksums and cutting to the next one
                ours.settimeout(20)
                threading.Thread(target=ours.sendall, args=(BULK,)).start()
                back = b""
                while len(back) < len(BULK):
                    back += ours.recv(1 << 16)
                assert back == BULK
        assert vlan_link_name(world.plan.ports[0]) not in netns.inside(world.plan.namespace, action=link_names)
        worlds.fence.prove(world.plan)  # closed, the fence is as it was built
    finally:
        vlan.close()


def link_names() -> set[str]:
    return {link.name for link in links.all_links()}


@pytest.mark.parametrize(
    ("kind", "following"),
    [("networkd", Rung.LINK_FLAP), ("dhclient", Rung.OLD_ADDRESS), ("udhcpc", Rung.OLD_ADDRESS)],
)
def test_other_clients_ignore_it_and_the_next_rung_reaches_them(
    kind: str, following: Rung, worlds: Worlds, production: Production, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    world = boot(worlds, CLIENTS[kind](machine(worlds), tmp_path))
    moved = move(world, Rung.FORCERENEW, following, exchanges=(production.exchange(),))
    print(f"{kind}: {[(item.rung.value, round(item.seconds, 2), item.failure) for item in moved.attempts]}")
    assert moved.rung is following
    assert moved.attempts[0].failure == "the clone's DHCP client did not obey FORCERENEW"
    assert moved.attempts[0].seconds < LIMIT_SECONDS


@dataclass(frozen=True)
class Seen:
    """One FORCERENEW as a clone sees it."""

    moment: float
    frame: Frame
    datagram: Datagram
    message: DhcpMessage


def listen(clone: StandIn, interface: str, *, seconds: float) -> tuple[list[Seen], threading.Thread]:
    """Collect what is sent to a clone's DHCP client for some time, in a thread."""
    packets = netns.inside(clone.namespace, action=lambda: PacketSocket(interface))
    seen: list[Seen] = []

    def collect() -> None:
        end = time.monotonic() + seconds
        with packets:
            while (left := end - time.monotonic()) > 0:
                received = packets.receive(timeout_seconds=left)
                if received is None or received[1]:
                    continue
                frame = Frame.decode(received[0])
                if frame.ethertype == ETHERTYPE_IPV4:
                    datagram = Datagram.decode(frame.payload)
                    seen.append(Seen(time.monotonic(), frame, datagram, decode(datagram.data)))

    thread = threading.Thread(target=collect)
    thread.start()
    return seen, thread


def test_every_nic_is_asked_as_what_is_known_of_it_allows(worlds: Worlds) -> None:
    """Signed and repeated, with a tag, where the exchange was seen; once where not; never where it is static."""
    macs = (MAC, "52:54:00:aa:00:02", "52:54:00:aa:00:03")
    world = worlds.empty(macs=macs)
    nonce, address = bytes(range(16)), IPv4Address("10.9.7.70")
    exchange = Exchange(
        mac=macs[1], address=address, server=SERVER, xid=0xCAFE, nonce=nonce, seen=datetime.now(UTC), vlan=42
    )
    listening = [listen(world.clone, f"eth{index}", seconds=2.5) for index in range(3)]
    rung = ForceRenew(spacing_seconds=(0.2, 0.4, 0.8))
    request = replace(
        request_for(world, Rung.FORCERENEW, exchanges=(exchange,)), static_macs=frozenset({macs[2].upper()})
    )
    drivers = {Rung.FORCERENEW: rung}
    with NetworkAddressing(clock=SystemClock(), drivers=drivers) as addressing, pytest.raises(DeadlineError) as raised:
        addressing.move(request, links=world.cables, cancel=SwitchCancel())
    assert "did not obey FORCERENEW" in str(raised.value.details)
    for _, thread in listening:
        thread.join()
    plain, signed, static = (seen for seen, _ in listening)
    assert static == []

    (once,) = plain
    assert (once.frame.destination, once.frame.tags) == (parse_mac(macs[0]), ())
    assert (once.datagram.source, once.datagram.destination) == (GATEWAY, OLD.interface.ip)
    assert (once.datagram.source_port, once.datagram.destination_port) == (67, 68)
    assert once.message.message_type is MessageType.FORCERENEW
    assert once.message.option(OptionCode.AUTHENTICATION) is None

    assert len(signed) == 3
    first, second, third = (item.moment for item in signed)
    assert second - first == pytest.approx(0.2, abs=0.15)
    assert third - second == pytest.approx(0.4, abs=0.15)
    last = 0
    for item in signed:
        assert (item.frame.destination, item.frame.tags) == (parse_mac(macs[1]), ((0x8100, 42),))
        assert (item.datagram.source, item.datagram.destination) == (SERVER, address)
        assert (item.message.ciaddr, item.message.xid) == (address, 0xCAFE)
        assert item.message.address(OptionCode.SERVER_ID) == SERVER
        assert is_signed(item.datagram.data, message=item.message, nonce=nonce, after=last)
        proof = authentication_of(item.message)
        assert proof is not None
        last = proof.replay


def test_a_static_guest_is_not_asked_and_nothing_is_waited_for(worlds: Worlds) -> None:
    world = worlds.empty()
    request = replace(request_for(world, Rung.FORCERENEW, exchanges=()), old_addresses=())
    started = time.monotonic()
    with NetworkAddressing(clock=SystemClock()) as addressing, pytest.raises(DeadlineError) as raised:
        addressing.move(request, links=world.cables, cancel=SwitchCancel())
    assert "no address that the guest may have by DHCP is known" in str(raised.value.details)
    assert time.monotonic() - started < 2


def test_a_cancelled_run_leaves_nothing_of_it(worlds: Worlds) -> None:
    world = worlds.empty()
    cancel = SwitchCancel()
    timer = threading.Timer(0.7, lambda: setattr(cancel, "on", True))
    timer.start()
    with NetworkAddressing(clock=SystemClock()) as addressing, pytest.raises(CancelledError):
        addressing.move(request_for(world, Rung.FORCERENEW, exchanges=()), links=world.cables, cancel=cancel)
    worlds.fence.prove(world.plan)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vmsnap")]
