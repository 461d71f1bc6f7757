"""The watch over a fence while its clone runs: threads that sleep until the kernel has news.

One thread does nothing but hear: a packet of the clone's on a link where none may be (``vmsnap.network.ears``), a
production bridge that learns the original's MAC at another port than the original's, which is what a clone that got out
would make it do, and a link of the fence that is moved into another namespace. The other reads the fence back, as it was
for the proof, when a link, an address or an nft table of the fence has changed, and every few seconds in case news was
lost. They are two because reading rules takes long on a host with many.

What it cannot see: what happens in other network namespaces than the host's and the fence's, and frames that leave the
host past its network stack (a NIC given to the guest, refused by the preflight).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from ipaddress import IPv4Address

from vmsnap.errors import DriverError, IsolationError, VmsnapError
from vmsnap.model.isolation import FencePlan, ProofKind, ProofPoint
from vmsnap.network import links, readback, rules
from vmsnap.network.ears import Ears
from vmsnap.network.kernelnews import Learned, LinkNews, RuleNews
from vmsnap.network.production import Side, answers, ports_of, sides_of

_LOG = logging.getLogger(__name__)
_WITHOUT_NEWS_SECONDS = 5.0
_BETWEEN_LOOKS_SECONDS = 0.1
_NEW_TAP_SECONDS = 0.5  # a hypervisor makes a tap first and puts it into the bridge then
_FAILED_LOOKS = 3
_BEFORE = timedelta(seconds=1)
_WHILE = timedelta(seconds=5)
_REMEDY = "find out what changes links, rules or bridges on this host while vmsnap runs; nothing was stored"


class NetworkWatch:
    """See ``vmsnap.ports.network.FenceWatch``. Opens its ears first, looks at the fence, then starts its thread."""

    def __init__(self, plan: FencePlan, *, alarm: Callable[[IsolationError], None]) -> None:
        self._plan = plan
        self._alarm = alarm
        self._breach: IsolationError | None = None
        self._sounding = threading.Lock()
        self._began = self._last_look = self._look_at = time.monotonic()
        self._looks = 0
        self._failed_looks = 0
        self._new_tap_at = float("-inf")
        self._taps = self._tap_indexes()
        self._threads = (
            threading.Thread(target=self._run, args=(self._hear,), name="vmsnap-fence-ears", daemon=True),
            threading.Thread(target=self._run, args=(self._watch,), name="vmsnap-fence-watch", daemon=True),
        )
        with ExitStack() as opened:
            self._ears = Ears(plan)
            opened.callback(self._ears.close)
            self._link_news = LinkNews()
            opened.callback(self._link_news.close)
            self._rule_news = RuleNews(plan.table)
            opened.callback(self._rule_news.close)
            self._changed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(os.close, self._changed)
            self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(os.close, self._stop)
            self._sides = sides_of(plan.original)
            self._answered = {side.nic.mac: answers(side, timeout=_BEFORE) for side in self._sides}
            self._look()
            if self._breach is not None:
                raise self._breach
            for thread in self._threads:
                thread.start()
            self._opened = opened.pop_all()

    def observed(self) -> tuple[ProofPoint, ...]:
        """Return what the watch saw until now. Raises IsolationError."""
        self._listen()
        self._require_peace()
        seconds = time.monotonic() - self._began
        try:
            counted = rules.counts(self._plan)
            host_links = len(links.all_links())
        except DriverError as exc:
            raise IsolationError(f"the fence cannot be read any more: {exc.brief}", remedy=_REMEDY) from exc
        dropped = [(label, count.packets) for label, count in counted.items() if _is_drop(label) and count.packets]
        return (
            _point(
                ProofKind.PRODUCTION,
                name="ears on the host's links",
                observed=f"0 frames from our ports on {host_links} links in {seconds:.1f} s, from before the clone ran",
            ),
            _point(
                ProofKind.PRODUCTION,
                name="watch over the fence",
                observed=f"read back {self._looks} times, nothing changed",
            ),
            _point(
                ProofKind.PRODUCTION,
                name="frames dropped",
                observed="; ".join(f"{label}: {packets}" for label, packets in dropped) or "none",
            ),
        )

    def original(self) -> tuple[ProofPoint, ...]:
        """Return how the original is on its own links. Raises IsolationError."""
        self._require_peace()
        try:
            return tuple(point for side in self._sides for point in self._side_points(side))
        except DriverError as exc:
            raise IsolationError(f"the original cannot be looked at: {exc.brief}", remedy=_REMEDY) from exc

    def _side_points(self, side: Side) -> tuple[ProofPoint, ...]:
        name = f"original {side.nic.mac} on {side.nic.attached_to}"
        if side.tap is None or side.bridge is None:
            return (_point(ProofKind.ORIGINAL, name=name, observed="not on a Linux bridge of this host; not asked"),)
        answered = answers(side, timeout=_WHILE if self._answered[side.nic.mac] else _BEFORE)
        if answered is None and self._answered[side.nic.mac] is not None:
            raise IsolationError(
                f"the original does not answer ARP at {self._answered[side.nic.mac]} any more",
                details=f"it did by {side.tap.name} before the clone ran",
                remedy="look at the original's network; nothing was stored",
            )
        ports = ports_of(side.nic.mac, bridge=side.bridge)
        if any(port != side.tap.index for port in ports):
            raise self._moved(side, port=next(port for port in ports if port != side.tap.index))
        arp = _arp_words(answered, side=side)
        table = f"on {side.tap.name} in the table of {side.bridge.name}" if ports else "not in the bridge's table"
        return (_point(ProofKind.ORIGINAL, name=name, observed=f"{arp}; {table}"),)

    def passed_bytes(self) -> int:
        """Return how much came from the clone to our side of the fence. Raises DriverError."""
        counted = rules.counts(self._plan, families=(rules.ACROSS.family,))
        return sum(counted[rules.passing_label(port)].size_bytes for port in self._plan.ports)

    def close(self) -> None:
        """End the watch. May be repeated."""
        if any(thread.is_alive() for thread in self._threads):
            os.eventfd_write(self._stop, 1)
            for thread in self._threads:
                thread.join()
        self._opened.close()

    # The threads

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a watch that ends at a bug watches no more
            self._sound(IsolationError(f"the watch over the fence failed: {error!r}", remedy=_REMEDY))

    def _hear(self) -> None:
        poll = _poll(self._ears.fileno(), self._link_news.fileno(), self._stop)
        while self._breach is None and self._stop not in _ready(poll):
            self._listen()
            news = self._link_news.read()
            for learned in news.learned:
                self._judge(learned)
            for name in news.moved_away:
                self._require_elsewhere(name)
            if news.changed:
                os.eventfd_write(self._changed, 1)

    def _watch(self) -> None:
        poll = _poll(self._changed, self._rule_news.fileno(), self._stop)
        while self._breach is None:
            ready = _ready(poll, seconds=self._look_at - time.monotonic())
            if self._stop in ready:
                return
            if self._changed in ready:
                os.eventfd_read(self._changed)
            if self._rule_news.read() or self._changed in ready:
                self._look_at = min(self._look_at, self._last_look + _BETWEEN_LOOKS_SECONDS)
            if time.monotonic() >= self._look_at:
                self._look()

    def _require_elsewhere(self, name: str) -> None:
        """A link of another's may go where it likes. One of the fence's would live on where nobody looks."""
        if name in {link for port in self._plan.ports for link in (port.bridge, port.tap, port.veth_host)}:
            self._sound(
                IsolationError(
                    f"the fence's link {name} was moved into another network namespace while the clone ran",
                    remedy=_REMEDY,
                )
            )

    def _listen(self) -> None:
        heard = self._ears.heard()
        if heard:
            link, data = heard[0]
            self._sound(
                IsolationError(
                    f"a frame from the clone's side of the fence was on the host's link {link}",
                    details=f"{len(heard)} frames; the first: {data[:64].hex()}",
                    remedy=_REMEDY,
                )
            )

    def _judge(self, news: Learned) -> None:
        for side in self._sides:
            if side.tap is None or side.bridge is None or news.mac != side.nic.mac:
                continue
            if news.bridge == side.bridge.index and news.port != side.tap.index:
                self._sound(self._moved(side, port=news.port))

    def _moved(self, side: Side, *, port: int) -> IsolationError:
        where = _name_of(port)
        bridge, tap = (link.name if link else "?" for link in (side.bridge, side.tap))
        return IsolationError(
            f"the bridge {bridge} saw the original's MAC {side.nic.mac} at {where}, not at {tap}",
            remedy="the clone, another machine with this MAC, or a loop in the network; nothing was stored",
        )

    def _look(self) -> None:
        self._last_look = time.monotonic()
        self._look_at = self._last_look + _WITHOUT_NEWS_SECONDS
        self._looks += 1
        try:
            self._meet_new_taps()
            # Not a breach but a second line: the host's ip_forward was written, as network managers do.
            for port in self._plan.ports:
                links.route_nothing(port.bridge)
            found = readback.changes(self._plan)
        except VmsnapError as error:
            self._failed_looks += 1
            self._look_at = self._last_look + _BETWEEN_LOOKS_SECONDS
            if self._failed_looks >= _FAILED_LOOKS:
                self._sound(IsolationError(f"the fence cannot be read any more: {error.brief}", remedy=_REMEDY))
            return
        self._failed_looks = 0
        if not found:
            return
        taps = [port.tap for port in self._plan.ports]
        is_young = self._last_look - self._new_tap_at < _NEW_TAP_SECONDS
        if is_young and all(any(tap in line for tap in taps) for line in found):
            self._look_at = self._last_look + _BETWEEN_LOOKS_SECONDS
            return
        self._sound(
            IsolationError(
                f"the fence {self._plan.namespace} changed while the clone ran: {found[0]}",
                details="\n".join(found),
                remedy=_REMEDY,
            )
        )

    def _meet_new_taps(self) -> None:
        """A NIC that was unplugged and plugged again has a new tap; its IPv6 was on until now."""
        now = self._tap_indexes()
        if now == self._taps:
            return
        for tap, index in now.items():
            if self._taps.get(tap) != index:
                links.switch_ipv6_off(tap)
                self._new_tap_at = time.monotonic()
        self._taps = now
        self._ears.know_ends()

    def _tap_indexes(self) -> dict[str, int]:
        known = {name: index for index, name in socket.if_nameindex()}
        return {port.tap: known[port.tap] for port in self._plan.ports if port.tap in known}

    def _sound(self, breach: IsolationError) -> None:
        with self._sounding:
            if self._breach is not None:
                return
            self._breach = breach
        self._alarm(breach)

    def _require_peace(self) -> None:
        if self._breach is not None:
            raise self._breach
        if not all(thread.is_alive() for thread in self._threads):
            raise IsolationError("the watch over the fence is not there any more", remedy="nothing was stored")


def _poll(*descriptors: int) -> select.poll:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return poll


def _ready(poll: select.poll, *, seconds: float | None = None) -> frozenset[int]:
    return frozenset(found for found, _ in poll.poll(None if seconds is None else max(seconds, 0) * 1000))


def _point(kind: ProofKind, *, name: str, observed: str) -> ProofPoint:
    return ProofPoint(kind=kind, name=name, observed=observed)


def _arp_words(answered: IPv4Address | None, *, side: Side) -> str:
    if answered is not None and side.tap is not None:
        return f"answers ARP at {answered} by {side.tap.name}"
    return "does not answer ARP, as before" if side.addresses else "its address is not known; not asked"


def _is_drop(label: str) -> bool:
    return " marked" not in label and ("elsewhere" in label or "host" in label or "out of its bridge" in label)


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"link {index}"
