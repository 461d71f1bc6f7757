"""The passive watcher on a bridge between a real DHCP server and real clients."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from integration.dhcp_clients import Dhcpcd
from integration.networld import StandIn, SwitchCancel, fresh_network, sh, stop
from integration.waiting import wait_until
from vmsnap.dhcp.authentication import Authentication, Proof
from vmsnap.dhcp.message import DhcpMessage, MessageType, Op, Option, OptionCode, encode
from vmsnap.model.isolation import Exchange
from vmsnap.network.frames import ETHERTYPE_IPV4, Datagram, Frame, parse_mac
from vmsnap.network.packets import PacketSocket
from vmsnap.network.watcher import DhcpWatcher, Watched
from vmsnap.state.exchanges import FileExchanges

MAC, OTHER = "52:54:00:aa:00:01", "52:54:00:aa:00:02"
NONCE = bytes(range(16))


class Watching:
    """A production bridge with a DHCP server behind one of its ports, and the watcher on the bridge itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.book = FileExchanges(folder / "state")
        self.told: list[Exchange] = []
        self.machines: list[StandIn] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.cancel = SwitchCancel()
        watched = Watched(macs=frozenset({MAC}), interfaces=frozenset({"prod"}))
        self.watcher = DhcpWatcher(self.book, look=lambda: watched, tell=self.told.append)
        self.thread = threading.Thread(target=lambda: self.watcher.run(cancel=self.cancel))
        self.add_bridge()
        self.thread.start()
        wait_until(lambda: "promiscuity 1" in sh("ip", "-d", "link", "show", "prod"), what="the watcher's socket")

    def add_bridge(self) -> None:
        sh("ip", "link", "add", "prod", "type", "bridge")
        sh("ip", "link", "set", "prod", "up")

    def machine(self) -> StandIn:
        self.machines.append(StandIn())
        return self.machines[-1]

    def add_server(self) -> Path:
        server, log = self.machine(), self.folder / f"dnsmasq-{len(self.machines)}.log"
        server.plug(f"srv{len(self.machines)}", bridge="prod")
        server.run("ip", "addr", "add", "10.9.8.1/24", "dev", "eth0")
        self.processes.append(
            server.start(
                "dnsmasq", "-k", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces", "--user=root",
                "--dhcp-range=10.9.8.77,10.9.8.99,120", "--dhcp-authoritative", "--log-dhcp", f"--log-facility={log}",
                f"--dhcp-leasefile={self.folder}/leases", f"--pid-file={self.folder}/pid-{len(self.machines)}",
            )
        )  # fmt: skip
        return log

    def add_client(self, mac: str) -> StandIn:
        client = self.machine()
        client.plug(f"cli{len(self.machines)}", mac=mac, bridge="prod")
        folder = self.folder / client.namespace
        folder.mkdir()
        self.processes.append(Dhcpcd(client, folder).start())
        return client

    def stop_watching(self) -> None:
        self.cancel.on = True
        self.thread.join(5)
        assert not self.thread.is_alive()

    def close(self) -> None:
        self.stop_watching()
        for process in self.processes:
            stop(process)
        for machine in self.machines:
            machine.close()


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watching]:
    tmp_path.chmod(0o755)
    with fresh_network():
        made = Watching(tmp_path)
        try:
            yield made
        finally:
            made.close()


def test_the_last_exchange_of_a_protected_guest_is_kept(watching: Watching) -> None:
    log = watching.add_server()
    client, other = watching.add_client(MAC), watching.add_client(OTHER)
    wait_until(lambda: bool(watching.told and client.addresses() and other.addresses()), what="two leases")
    kept = watching.book.get(MAC)
    assert kept is not None
    assert [str(kept.address)] == client.addresses()
    assert kept.server == IPv4Address("10.9.8.1")
    assert kept.client.startswith("dhcpcd-")
    assert (kept.nonce, kept.vlan) == (None, None)
    acks = re.findall(rf"(\d+) DHCPACK\(eth0\) {kept.address} {MAC}", log.read_text())
    assert str(kept.xid) == acks[-1], "the server's own record names the same exchange"
    assert watching.book.get(OTHER) is None
    (file,) = (watching.folder / "state" / "exchanges").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_it_survives_its_bridge_and_ends_when_told(watching: Watching) -> None:
    wait_until(watching.thread.is_alive, what="the watcher")
    sh("ip", "link", "del", "prod")
    time.sleep(1.5)
    assert watching.thread.is_alive()
    watching.add_bridge()
    wait_until(lambda: "promiscuity 1" in sh("ip", "-d", "link", "show", "prod"), what="the watcher's return")
    sh("ip", "link", "set", "prod", "down")
    time.sleep(1)
    sh("ip", "link", "set", "prod", "up")
    watching.add_server()
    watching.add_client(MAC)
    wait_until(lambda: bool(watching.told), what="an exchange on the new bridge")
    watching.stop_watching()
    assert "promiscuity 0" in sh("ip", "-d", "link", "show", "prod")


def acknowledgement(*, xid: int, tags: tuple[tuple[int, int], ...]) -> bytes:
    authentication = Authentication(proof=Proof.NONCE, replay=1, value=NONCE)
    message = DhcpMessage(
        op=Op.REPLY, xid=xid, chaddr=parse_mac(MAC), yiaddr=IPv4Address("10.9.8.80"),
        options=(
            Option(OptionCode.MESSAGE_TYPE, bytes([MessageType.ACK])),
            Option(OptionCode.SERVER_ID, IPv4Address("10.9.8.1").packed),
            Option(OptionCode.AUTHENTICATION, authentication.encode()),
        ),
    )  # fmt: skip
    datagram = Datagram(
        source=IPv4Address("10.9.8.1"), source_port=67, destination=IPv4Address("10.9.8.80"), destination_port=68,
        data=encode(message),
    )  # fmt: skip
    plain = Frame(destination=parse_mac(MAC), source=parse_mac("52:54:00:bb:00:01"), ethertype=ETHERTYPE_IPV4,
                  payload=datagram.encode())  # fmt: skip
    return replace(plain, tags=tags).encode()


@pytest.mark.parametrize("by", ["a port", "the host"])
@pytest.mark.parametrize(
    ("tags", "vlan"), [((), None), (((0x8100, 0x2064),), 100), (((0x88A8, 5),), 5), (((0x8100, 0x6000),), None)]
)
def test_nonce_and_vlan_are_read(
    by: str, tags: tuple[tuple[int, int], ...], vlan: int | None, watching: Watching
) -> None:
    """Tags of frames from a port reach the watcher beside the frame; of frames that the host sends, inside it."""
    watching.machine().plug("port", bridge="prod")
    sh("ip", "link", "add", "inside", "type", "veth", "peer", "name", "outside")
    for name in ("inside", "outside"):
        sh("ip", "link", "set", name, "up")
    sh("ip", "link", "set", "outside", "master", "prod")
    # The kernel lets a port forward when it has seen the carrier, a moment after the link was set up.
    wait_until(lambda: "state forwarding" in sh("bridge", "link", "show", "dev", "outside"), what="the port")
    with PacketSocket("prod" if by == "the host" else "inside") as packets:
        packets.send(acknowledgement(xid=77, tags=tags))
        wait_until(lambda: bool(watching.told), what="the exchange", seconds=5)
    kept = watching.book.get(MAC)
    assert kept is not None
    assert (kept.xid, kept.nonce, kept.vlan) == (77, NONCE, vlan)
    assert len(watching.told) == 1
