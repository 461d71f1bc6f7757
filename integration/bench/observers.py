"""What is looked at while a capture runs, the same for every mode: memory of the host, and the guest from outside."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from types import TracebackType
from typing import Self

from integration.lab.commands import LabError, run
from integration.lab.lab import Lab

_PERIOD_S = 0.05


class ExtraMemory:
    """The most memory that all processes of the lab and their tmpfs took while the block ran, above what they had before.

    Counted are anonymous and shared pages of processes (proc(5), status) and pages in tmpfs; not the page cache, which the
    kernel gives up by itself. A page in a tmpfs that a process also maps would count twice; none does here.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-memory", daemon=True)
        self._before = 0
        self._most = 0

    def __enter__(self) -> Self:
        self._before = self._most = _lab_memory_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        return self._most - self._before

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._most = max(self._most, _lab_memory_bytes())


def _lab_memory_bytes() -> int:
    pages = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, KeyError):  # it ended meanwhile, or is a kernel thread
                status = (entry / "status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines())
                pages += sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return pages + sum(_used_bytes(mount) for mount in _tmpfs_mounts())


def _tmpfs_mounts() -> set[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if line.split()[2] == "tmpfs" and line.split()[1].startswith("/run")}


def _used_bytes(mount: str) -> int:
    with suppress(OSError):  # unmounted meanwhile
        status = os.statvfs(mount)
        return (status.f_blocks - status.f_bfree) * status.f_frsize
    return 0


@dataclass(frozen=True)
class Silence:
    """A time in which the guest was asked and did not answer."""

    began_s: float  # seconds since the epoch
    seconds: float


class OutsideView:
    """A client in a network namespace of its own on the production bridge, which asks the guest every millisecond.

    It sends ICMP echo requests (RFC 792), because the guest's kernel answers those whatever its programs do.
    """

    def __init__(self, lab: Lab, *, guest_address: str) -> None:
        self._namespace = "bench-outside"
        self._address = guest_address
        self._lab = lab
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        network = IPv4Interface(self._lab.gateway).network
        mine = f"{network.network_address + 250}/{network.prefixlen}"
        inside = ["ip", "-n", self._namespace]
        run(["ip", "netns", "add", self._namespace])
        run(["ip", "link", "add", "bench0", "type", "veth", "peer", "name", "eth0", "netns", self._namespace])
        run(["ip", "link", "set", "bench0", "master", self._lab.bridge, "up"])
        run([*inside, "address", "add", mine, "dev", "eth0"])
        run([*inside, "link", "set", "eth0", "up"])
        argv = [
            "ip",
            "netns",
            "exec",
            self._namespace,
            sys.executable,
            "-m",
            "integration.bench.observers",
            self._address,
        ]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        run(["ip", "link", "del", "bench0"])
        run(["ip", "netns", "del", self._namespace])

    def silences(self) -> list[Silence]:
        """Stop asking; returns every time longer than two milliseconds in which no answer came."""
        assert self._process is not None
        out, _ = self._process.communicate("", timeout=30)
        found = [Silence(began_s=began, seconds=seconds) for began, seconds in json.loads(out)]
        if not found and self._process.returncode != 0:
            raise LabError(f"the client outside ended with exit status {self._process.returncode}")
        return found


def longest_ms(silences: list[Silence], *, begin_s: float, end_s: float) -> float:
    """The longest silence that overlaps a span of time, in milliseconds; 0 where there is none."""
    lengths = [s.seconds for s in silences if s.began_s < end_s and s.began_s + s.seconds > begin_s]
    return round(max(lengths, default=0.0) * 1000, 1)


def _ask(address: str) -> None:
    """Ask until stdin is closed, then print the silences.

    A silence begins with the first request after an answer and ends with the next answer, by the kernel's time of arrival:
    what this program itself is late by is not the guest's.
    """
    with suppress(PermissionError):
        os.nice(-10)
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    raw.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS, asm-generic/socket.h
    raw.connect((address, 0))
    identifier = os.getpid() & 0xFFFF
    asked_s: float | None = None
    silences: list[tuple[float, float]] = []
    stop = threading.Event()
    threading.Thread(target=_set_at_end_of_input, args=(stop,), daemon=True).start()
    number = 0
    next_s = time.monotonic()
    while not stop.is_set():
        number = (number + 1) & 0xFFFF
        now = time.time()
        with suppress(BlockingIOError, ConnectionError, OSError):
            raw.send(_request(identifier, number))
            asked_s = asked_s or now
        next_s = max(next_s + 0.001, time.monotonic())
        while True:
            for arrived_s in _answers(raw, identifier):
                if asked_s is not None and arrived_s >= asked_s:
                    if arrived_s - asked_s > 0.002:
                        silences.append((asked_s, arrived_s - asked_s))
                    asked_s = None
            left = next_s - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, 0.0005))
    if asked_s is not None:
        silences.append((asked_s, time.time() - asked_s))
    print(json.dumps(silences))


def _set_at_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def _request(identifier: int, number: int) -> bytes:
    words = (0x0800, 0, identifier, number)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!4H", words[0], ~total & 0xFFFF, identifier, number)


def _answers(raw: socket.socket, identifier: int) -> list[float]:
    """When the answers arrived that are there by now."""
    arrived = []
    with suppress(BlockingIOError, ConnectionError):
        while True:
            packet, notes, _, _ = raw.recvmsg(256, 64)
            header = (packet[0] & 15) * 4
            kind, _, _, mine, _ = struct.unpack_from("!BBHHH", packet, header)
            if kind == 0 and mine == identifier:
                for _, _, data in notes:
                    seconds, nanoseconds = struct.unpack("qq", data[:16])
                    arrived.append(seconds + nanoseconds / 1e9)
    return arrived


if __name__ == "__main__":
    _ask(sys.argv[1])
