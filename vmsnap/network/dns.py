"""Names of environments, by dynamic update (RFC 2136) signed with a shared key (TSIG, RFC 8945).

Every update carries its own conditions, so that the server decides and changes in one step: a name is added where it
does not exist, and changed or removed where the TXT record beside it says that it is the run's. Updates go over TCP:
one that was lost on the way is told from one that was not answered.
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
import stat
import threading
import time
from datetime import timedelta
from ipaddress import IPv4Address
from pathlib import Path

import dns.exception
import dns.name
import dns.query
import dns.rcode
import dns.tsig
import dns.update
from pydantic import ValidationError

from vmsnap.errors import ConfigError, DriverError, HeldError, PreconditionError, VmsnapError
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.names import DnsZone

_LIMIT_SECONDS = 3.0
# A server that did not answer is not asked again for so long: a sweep of many names must not take minutes.
_SILENCE_SECONDS = 30.0
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_LARGEST_KEY_BYTES = 4096


class _UnansweredError(DriverError):
    """An update was sent, and nobody knows what became of it."""


class DnsNames:
    """Registers names with dnspython. Thread-safe. It remembers for half a minute which servers do not answer."""

    def __init__(self, *, limit_seconds: float = _LIMIT_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._silent: dict[tuple[str, int], float] = {}

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the one kind that this owner releases."""
        return frozenset({ResourceKind.DNS_RECORD})

    def resource(self, run: RunId, *, guest: str, full_name: str, zone: DnsZone) -> Resource:
        """Name the record."""
        return Resource(
            kind=ResourceKind.DNS_RECORD, run=run, guest=guest, name=full_name, detail=zone.model_dump_json()
        )

    def register(self, resource: Resource, *, address: IPv4Address, ttl: timedelta) -> None:
        """Add the name or change its address; see ``vmsnap.ports.names.Names``."""
        zone = _zone_of(resource)
        update = _Update(zone, resource=resource)
        seconds = round(ttl.total_seconds())
        added = self._send(zone, update.adding(address, seconds=seconds))
        if added == dns.rcode.NOERROR:
            return
        if added == dns.rcode.YXDOMAIN:
            changed = self._send(zone, update.changing(address, seconds=seconds))
            if changed == dns.rcode.NOERROR:
                return
            if changed in {dns.rcode.NXRRSET, dns.rcode.NXDOMAIN}:
                raise HeldError(
                    f"the name {resource.name} is taken, and not by this environment",
                    remedy="choose another --name for the environment, or another 'name' in [environment.dns]",
                )
            added = changed
        raise _refused(added, resource=resource, zone=zone)

    def release(self, resource: Resource, *, deadline: timedelta) -> None:  # noqa: ARG002 - the limit is far below any
        """Remove the name where it is the run's. May be repeated."""
        zone = _zone_of(resource)
        code = self._send(zone, _Update(zone, resource=resource).removing())
        if code not in {dns.rcode.NOERROR, dns.rcode.NXRRSET, dns.rcode.NXDOMAIN}:
            raise _refused(code, resource=resource, zone=zone)

    def owned(self) -> tuple[Resource, ...]:
        """Return nothing: a key for updates does not list a zone. The journal has what was registered."""
        return ()

    def _send(self, zone: DnsZone, update: dns.update.UpdateMessage) -> dns.rcode.Rcode:
        """Send an update and return the server's verdict.

        Raises PreconditionError where nothing was sent or nothing done, DriverError where nobody knows.
        """
        update.use_tsig(_keyring(zone), algorithm=dns.name.from_text(zone.algorithm))
        server = (str(zone.server), zone.port)
        self._refuse_silent(server)
        end = time.monotonic() + self._limit_seconds
        try:
            connection = socket.create_connection(server, timeout=self._limit_seconds)
        except OSError as error:
            self._note_silent(server)
            raise _unreachable(zone, error) from error
        with connection:
            connection.setblocking(False)
            try:
                answer = dns.query.tcp(
                    update, server[0], port=server[1], sock=connection, timeout=max(end - time.monotonic(), 0.1)
                )
            except dns.tsig.PeerError as error:
                # The server says so itself, and such an answer changes nothing (RFC 8945, section 5.2).
                raise _bad_key(zone, error) from error
            except (dns.exception.DNSException, OSError, EOFError) as error:
                if isinstance(error, dns.exception.Timeout):
                    self._note_silent(server)
                raise _UnansweredError(
                    f"the DNS server {zone.server} gave no valid answer to an update of {zone.zone}: {error!r}",
                    remedy="look at the server's log; run 'vmsnap env register' or 'vmsnap reconcile' when it is well again",
                ) from error
        return answer.rcode()

    def _refuse_silent(self, server: tuple[str, int]) -> None:
        with self._lock:
            since = self._silent.get(server)
        if since is not None and time.monotonic() - since < _SILENCE_SECONDS:
            raise PreconditionError(
                f"the DNS server {server[0]} port {server[1]} did not answer a moment ago", remedy="try again later"
            )

    def _note_silent(self, server: tuple[str, int]) -> None:
        with self._lock:
            self._silent[server] = time.monotonic()


class _Update:
    """The updates for one name."""

    def __init__(self, zone: DnsZone, *, resource: Resource) -> None:
        self._zone = dns.name.from_text(zone.zone)
        self._name = dns.name.from_text(resource.name)
        self._owner = f'"vmsnap {resource.run}"'

    def adding(self, address: IPv4Address, *, seconds: int) -> dns.update.UpdateMessage:
        """Add the name where it does not exist."""
        update = dns.update.UpdateMessage(self._zone)
        update.absent(self._name)
        update.add(self._name, seconds, "A", str(address))
        update.add(self._name, seconds, "TXT", self._owner)
        return update

    def changing(self, address: IPv4Address, *, seconds: int) -> dns.update.UpdateMessage:
        """Change the address where the name is the run's."""
        update = dns.update.UpdateMessage(self._zone)
        update.present(self._name, "TXT", self._owner)
        update.replace(self._name, seconds, "A", str(address))
        return update

    def removing(self) -> dns.update.UpdateMessage:
        """Remove address and mark where the name is the run's. What others put beside them stays."""
        update = dns.update.UpdateMessage(self._zone)
        update.present(self._name, "TXT", self._owner)
        update.delete(self._name, "A")
        update.delete(self._name, "TXT", self._owner)
        return update


def _zone_of(resource: Resource) -> DnsZone:
    try:
        return DnsZone.model_validate_json(resource.detail)
    except ValidationError as error:
        raise DriverError(
            f"{resource.detail!r} does not say where {resource.name} is registered", remedy="the journal is damaged"
        ) from error


def _keyring(zone: DnsZone) -> dict[dns.name.Name, dns.tsig.Key]:
    name = dns.name.from_text(zone.key_name)
    return {name: dns.tsig.Key(name, _secret(Path(zone.key_file)), dns.name.from_text(zone.algorithm))}


def _secret(path: Path) -> bytes:
    """Return the secret in a key file. Raises ConfigError, which never shows it."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            text = stream.read(_LARGEST_KEY_BYTES)
    except OSError as error:
        raise ConfigError(
            f"cannot read the DNS key {path}: {error.strerror}", remedy="correct key_file in [environment.dns]"
        ) from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in {0, os.geteuid()}:
        raise ConfigError(f"the DNS key {path} is no file of root's", remedy=f"chown root {path}")
    if status.st_mode & _OTHERS:
        raise ConfigError(f"others may read or change the DNS key {path}", remedy=f"chmod 600 {path}")
    try:
        secret = base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ConfigError(
            f"the DNS key {path} is not base64", remedy="it holds the secret alone, on one line"
        ) from error
    if not secret:
        raise ConfigError(f"the DNS key {path} is empty", remedy="it holds the secret in base64")
    return secret


def _unreachable(zone: DnsZone, error: OSError) -> PreconditionError:
    return PreconditionError(
        f"the DNS server {zone.server} port {zone.port} cannot be reached: {error}",
        remedy="is it up, and 'server' in [environment.dns] right? 'vmsnap env register' tries again",
    )


def _bad_key(zone: DnsZone, error: dns.exception.DNSException) -> PreconditionError:
    return PreconditionError(
        f"the DNS server {zone.server} does not accept the key {zone.key_name}: {type(error).__name__}",
        details=str(error),
        remedy="compare key_name, algorithm and the secret in key_file with the server's, and the clocks",
    )


def _refused(code: dns.rcode.Rcode, *, resource: Resource, zone: DnsZone) -> VmsnapError:
    return PreconditionError(
        f"the DNS server {zone.server} refused the update of {resource.name}: {dns.rcode.to_text(code)}",
        remedy=f"is it the primary of {zone.zone}, and does it let the key {zone.key_name} update this name?",
    )
