"""Names of environments against a real BIND with TSIG.

Needs root. Each test has a network namespace of its own, and a server on its loopback.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from integration.dns_server import ZONE, Bind
from integration.networld import fresh_network
from tests.workflow.invocations import backup, provision, succeed
from vmsnap.errors import CleanupError, ConfigError, DriverError, HeldError, PreconditionError
from vmsnap.model.ids import RunId
from vmsnap.model.policy import DnsPolicy, EnvironmentPolicy
from vmsnap.network.dns import DnsNames
from vmsnap.ports.names import DnsZone, Names
from vmsnap.state.clock import SystemClock
from vmsnap.state.journal import FileJournals
from vmsnap.state.locks import FileLocks
from vmsnap.testing.names_contract import DEADLINE, HERE, ONE, THERE, TTL, NamesContract, NamesHarness
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.naming import register
from vmsnap.workflow.provision import destroy_environment
from vmsnap.workflow.reconcile import reconcile
from vmsnap.workflow.world import World


@pytest.fixture
def bind(tmp_path: Path) -> Iterator[Bind]:
    folder = tmp_path / "bind"
    folder.mkdir()
    with fresh_network():
        server = Bind(folder)
        try:
            yield server
        finally:
            server.stop()


class BindHarness:
    def __init__(self, bind: Bind) -> None:
        self._bind = bind

    @property
    def zone(self) -> DnsZone:
        return self._bind.zone

    def names(self) -> Names:
        return DnsNames()

    def look(self, name: str) -> tuple[str, ...]:
        return self._bind.records(name)

    def take(self, name: str, *, address: str) -> None:
        self._bind.add(name, "A", address)

    def stop(self) -> None:
        self._bind.stop()

    def wrong_key(self) -> DnsZone:
        return self._bind.wrong_key()

    def foreign_zone(self) -> DnsZone:
        return self._bind.foreign_zone()


class TestBind(NamesContract):
    @pytest.fixture
    def harness(self, bind: Bind) -> NamesHarness:
        return BindHarness(bind)


def test_the_mark_and_the_life_time_are_as_documented(bind: Bind) -> None:
    names, name = DnsNames(), f"db-test.{ZONE}"
    resource = names.resource(ONE, guest="db", full_name=name, zone=bind.zone)
    names.register(resource, address=HERE, ttl=timedelta(seconds=45))
    assert bind.records(name, "TXT") == (f'"vmsnap {ONE}"',)
    assert bind.ttl(name) == 45
    assert bind.key_file.read_text().strip() not in resource.detail, "no secret in the journal"


@pytest.mark.parametrize("record", [("TXT", '"note"'), ("A", "192.0.2.7"), ("AAAA", "2001:db8::7"), ("MX", "10 ns")])
def test_a_name_with_any_record_of_somebody_else_is_taken(bind: Bind, record: tuple[str, str]) -> None:
    names, name = DnsNames(), f"taken.{ZONE}"
    bind.add(name, *record)
    resource = names.resource(ONE, guest="db", full_name=name, zone=bind.zone)
    with pytest.raises(HeldError):
        names.register(resource, address=HERE, ttl=TTL)
    names.release(resource, deadline=DEADLINE)
    assert bind.records(name, record[0])


def test_only_what_is_ours_is_removed(bind: Bind) -> None:
    names, name = DnsNames(), f"db-test.{ZONE}"
    resource = names.resource(ONE, guest="db", full_name=name, zone=bind.zone)
    names.register(resource, address=HERE, ttl=TTL)
    bind.add(name, "AAAA", "2001:db8::7")
    names.release(resource, deadline=DEADLINE)
    assert bind.records(name) == bind.records(name, "TXT") == ()
    assert bind.records(name, "AAAA") == ("2001:db8::7",)


def test_a_key_that_the_server_does_not_know(bind: Bind) -> None:
    names = DnsNames()
    resource = names.resource(ONE, guest="db", full_name=f"db-test.{ZONE}", zone=bind.unknown_key())
    with pytest.raises(PreconditionError, match="nobody"):
        names.register(resource, address=HERE, ttl=TTL)
    with pytest.raises(PreconditionError, match="nobody"):
        names.release(resource, deadline=DEADLINE)


def test_a_key_file_that_others_may_read_is_not_used(bind: Bind) -> None:
    names = DnsNames()
    resource = names.resource(ONE, guest="db", full_name=f"db-test.{ZONE}", zone=bind.zone)
    for mode in (0o640, 0o604, 0o620):
        bind.key_file.chmod(mode)
        with pytest.raises(ConfigError, match="others") as refused:
            names.register(resource, address=HERE, ttl=TTL)
        assert "chmod 600" in (refused.value.remedy or "")
    bind.key_file.chmod(0o600)
    for text in ("", "not base64!"):
        bind.key_file.write_text(text)
        with pytest.raises(ConfigError):
            names.register(resource, address=HERE, ttl=TTL)
    bind.key_file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        names.register(resource, address=HERE, ttl=TTL)


@pytest.mark.parametrize("manner", ["silent", "closes", "garbage"])
def test_a_server_that_misbehaves_takes_a_few_seconds(bind: Bind, manner: str) -> None:
    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if manner == "garbage":
                connection.sendall(b"\0\x20" + os.urandom(32))
            if manner == "silent":
                kept.append(connection)
            else:
                connection.close()

    kept: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    try:
        zone = bind.zone.model_copy(update={"port": listener.getsockname()[1]})
        names = DnsNames(limit_seconds=0.5)
        resource = names.resource(ONE, guest="db", full_name=f"db-test.{ZONE}", zone=zone)
        began = time.monotonic()
        with pytest.raises(DriverError):
            names.register(resource, address=HERE, ttl=TTL)
        assert time.monotonic() - began < 2
        with pytest.raises((DriverError, PreconditionError)):
            names.release(resource, deadline=DEADLINE)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in kept:
            connection.close()


DIES = """
import os, signal, sys
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.network.dns import DnsNames
from vmsnap.ports.names import DnsZone
from vmsnap.state.journal import FileJournals

state, zone, when = Path(sys.argv[1]), DnsZone.model_validate_json(sys.argv[2]), sys.argv[3]
run = RunId("00000000d1")
journal = FileJournals(state).begin(run, kind=RunKind.PROVISION, guest="db", at=datetime.now(UTC))
names = DnsNames()
resource = names.resource(run, guest="db", full_name=f"orphan.{zone.zone}", zone=zone)
journal.intend(resource)
if when == "after":
    names.register(resource, address=IPv4Address("198.18.0.1"), ttl=timedelta(seconds=60))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_name_of_a_killed_run_is_swept(bind: Bind, tmp_path: Path, when: str) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    done = subprocess.run([sys.executable, "-c", DIES, str(state), bind.zone.model_dump_json(), when], check=False)
    assert done.returncode == -signal.SIGKILL
    assert bool(bind.records(f"orphan.{ZONE}")) == (when == "after")
    bind.add(f"other.{ZONE}", "A", "192.0.2.7")
    clock = SystemClock()
    world = replace(
        FakeWorld(tmp_path / "world").process(),
        journals=FileJournals(state), locks=FileLocks(state, clock=clock), names=DnsNames(), clock=clock,
    )  # fmt: skip
    report = reconcile(world)
    assert report.complete
    assert [item.name for item in report.undone] == [f"orphan.{ZONE}"]
    assert bind.records(f"orphan.{ZONE}") == ()
    assert bind.records(f"other.{ZONE}") == ("192.0.2.7",)
    assert reconcile(world).undone == ()


@pytest.fixture
def installation(bind: Bind, tmp_path: Path) -> World:
    """A fake host with one environment on a network, and real names."""
    lab = FakeWorld(tmp_path / "world")
    succeed(lab, backup())
    succeed(lab, provision(network="default"))
    return replace(lab.process(), names=DnsNames())


def environment_policy(bind: Bind) -> EnvironmentPolicy:
    zone = bind.zone
    return EnvironmentPolicy(
        dns=DnsPolicy(
            zone=zone.zone, server=zone.server, port=zone.port, key_name=zone.key_name, key_file=zone.key_file
        )
    )


def test_an_environment_is_registered_moved_and_removed(bind: Bind, installation: World) -> None:
    environment = installation.book.get("test")
    for address in (HERE, THERE):
        report = register(installation, environment, policy=environment_policy(bind), address=address)
        assert report.dns_name == f"test.{ZONE}"
        assert bind.records(report.dns_name) == (str(address),)
    destroy_environment(installation, name="test")
    assert bind.records(f"test.{ZONE}") == ()


def test_a_server_that_is_gone_keeps_no_environment(bind: Bind, installation: World) -> None:
    environment = installation.book.get("test")
    register(installation, environment, policy=environment_policy(bind), address=IPv4Address("192.0.2.9"))
    bind.stop()
    with pytest.raises(CleanupError, match="DNS"):
        destroy_environment(installation, name="test")
    assert installation.book.all() == ()
    report = reconcile(replace(installation, names=DnsNames()))
    assert [(item.kind, item.failure is None) for item in report.undone] == [("dns-record", False)]


def test_run_ids_are_the_marks(bind: Bind) -> None:
    """Two hosts may share a zone: neither touches the other's names."""
    names, name = DnsNames(), f"shared.{ZONE}"
    theirs = names.resource(RunId("00000000b7"), guest="db", full_name=name, zone=bind.zone)
    names.register(theirs, address=THERE, ttl=TTL)
    ours = names.resource(ONE, guest="db", full_name=name, zone=bind.zone)
    names.release(ours, deadline=DEADLINE)
    assert bind.records(name) == (str(THERE),)
