"""The relay over loopback: no root, no namespaces."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from vmsnap.errors import GuestUnreachableError
from vmsnap.network.relay import TcpRelay
from vmsnap.testing.threads import no_thread_left

PATIENCE_SECONDS = 10.0
Serve = Callable[[socket.socket], None]


@contextmanager
def server(serve: Serve) -> Iterator[tuple[str, int]]:
    """Serve each connection in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        with connection:
            serve(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=one, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(PATIENCE_SECONDS)
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()


@contextmanager
def relay_to(address: tuple[str, int], *, most: int = 256) -> Iterator[TcpRelay]:
    relay = TcpRelay(
        socket.create_server(("127.0.0.1", 0)), opener=lambda: socket.create_connection(address), most=most
    )
    try:
        yield relay
    finally:
        relay.close()


def client(relay: TcpRelay) -> socket.socket:
    connection = socket.create_connection(relay.address, timeout=PATIENCE_SECONDS)
    connection.settimeout(PATIENCE_SECONDS)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def digest(connection: socket.socket) -> None:
    """A server that speaks only after its client has said everything."""
    connection.sendall(hashlib.sha256(read_all(connection)).hexdigest().encode())


def test_what_is_said_arrives_whole_in_both_directions_at_once() -> None:
    said = os.urandom(5 << 20)

    def echo(connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            connection.sendall(data)

    with server(echo) as address, relay_to(address) as relay, client(relay) as connection:
        heard: list[bytes] = []
        reading = threading.Thread(target=lambda: heard.append(read_all(connection)))
        reading.start()
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        reading.join(PATIENCE_SECONDS)
        assert heard == [said]


def test_the_end_of_one_direction_leaves_the_other_open() -> None:
    with server(digest) as address, relay_to(address) as relay, client(relay) as connection:
        connection.sendall(b"everything")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == hashlib.sha256(b"everything").hexdigest().encode()


def test_many_connections_at_once_are_kept_apart() -> None:
    with server(digest) as address, relay_to(address) as relay, ExitStack() as stack:
        connections = [stack.enter_context(client(relay)) for _ in range(100)]
        for number, connection in enumerate(connections):
            connection.sendall(b"%d" % number)
        for number, connection in reversed(list(enumerate(connections))):
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == hashlib.sha256(b"%d" % number).hexdigest().encode()


def test_no_more_connections_than_allowed() -> None:
    with server(digest) as address, relay_to(address, most=2) as relay, client(relay) as one, client(relay) as two:
        with client(relay) as third, pytest.raises(ConnectionResetError):
            third.recv(1)
        for connection in (one, two):
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection)
        for _ in range(100):  # until the relay has noticed that both are over
            with client(relay) as fourth:
                try:
                    fourth.shutdown(socket.SHUT_WR)
                    assert read_all(fourth)
                except OSError:
                    continue
                return
        pytest.fail("a connection that is over makes room for another")


def test_a_connection_that_cannot_be_opened_is_reset_and_the_next_one_served(caplog: pytest.LogCaptureFixture) -> None:
    with server(digest) as address:
        answers: list[Exception | None] = [GuestUnreachableError("port 5432 is closed"), None]

        def opener() -> socket.socket:
            if (error := answers.pop(0)) is not None:
                raise error
            return socket.create_connection(address)

        relay = TcpRelay(socket.create_server(("127.0.0.1", 0)), opener=opener)
        try:
            # On a busy machine the reset may come before the connection is seen to stand.
            with pytest.raises(ConnectionResetError), client(relay) as refused:
                refused.recv(1)
            assert "port 5432 is closed" in caplog.text
            with client(relay) as served:
                served.shutdown(socket.SHUT_WR)
                assert read_all(served)
        finally:
            relay.close()


def test_a_reset_inside_reaches_the_client() -> None:
    def slam(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with server(slam) as address, relay_to(address) as relay, client(relay) as connection:
        connection.sendall(b"xx")
        with pytest.raises(ConnectionResetError):
            read_all(connection)


def test_closing_ends_listener_and_connections() -> None:
    gone = threading.Event()

    def wait(connection: socket.socket) -> None:
        try:
            connection.recv(1)
        except OSError:
            gone.set()

    with no_thread_left(), server(wait) as address, relay_to(address) as relay, client(relay) as connection:
        connection.sendall(b"")
        relay.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with pytest.raises(ConnectionRefusedError):
            client(relay)
