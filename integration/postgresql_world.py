"""A little world of namespaces that stands for a guest, and PostgreSQL servers in it, for tests of the engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.guests.access import Access
from vmsnap.model.command import Procedure, T
from vmsnap.model.drain import Instance
from vmsnap.model.policy import ClusterPolicy
from vmsnap.state.clock import SystemClock
from vmsnap.testing.fake_guest import run_procedure
from vmsnap.testing.local_agent import LocalAgent

# Another folder runs these tests over another version.
PROGRAMS = Path(os.environ.get("VMSNAP_TEST_POSTGRESQL", "/usr/lib/postgresql/15/bin"))
USER = "postgres"
ELSEWHERE = "192.0.2.1"  # an address of the world's own that is not loopback: its clients count as remote
PORT = 54329


@dataclass(frozen=True)
class World:
    """Processes and network of their own. All of it ends with its first process."""

    first: int
    folder: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.first), "--pid", "--mount", "--net", "--")

    def call(self, *argv: str, check: bool = True, text: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.prefix, "runuser", "-u", USER, "--", *argv],
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd="/",
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def start(self, *argv: str, **streams: int | IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self.prefix, "runuser", "-u", USER, "--", *argv], cwd="/", **streams)  # type: ignore[call-overload,no-any-return]

    def drive(self, procedure: Procedure[T]) -> T:
        agent = LocalAgent(prefix=self.prefix)
        try:
            return run_procedure(procedure, Access(clock=SystemClock()).agent(agent))
        finally:
            agent.close()


class Cluster:
    """One server in the world."""

    def __init__(self, world: World, *, name: str = "main", port: int = PORT) -> None:
        self.world = world
        self.directory = world.folder / name
        self.port = port

    def create(self) -> None:
        self.world.call(str(PROGRAMS / "initdb"), "-D", str(self.directory), "-A", "trust", "--no-sync")
        settings = (
            f"port = {self.port}",
            f"unix_socket_directories = '{self.world.folder}'",
            f"listen_addresses = '127.0.0.1,{ELSEWHERE}'",
            "max_prepared_transactions = 5",
            "shared_buffers = 16MB",
        )
        self.write("postgresql.conf", "\n".join(settings) + "\n")
        self.write("pg_hba.conf", "local all all trust\nhost all all 0.0.0.0/0 trust\nlocal replication all trust\n")

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)
        shutil.chown(self.directory / name, USER)

    def start(self) -> None:
        log = str(self.world.folder / f"{self.directory.name}.log")
        self.world.call(str(PROGRAMS / "pg_ctl"), "-D", str(self.directory), "-l", log, "-w", "start")

    def pg_ctl(self, *argv: str) -> None:
        self.world.call(str(PROGRAMS / "pg_ctl"), "-D", str(self.directory), *argv)

    def sql(self, text: str) -> str:
        return self.world.call(*self.client(), "-c", text).stdout.strip()

    def client(self, *, host: str | None = None) -> tuple[str, ...]:
        where = ("-h", host or str(self.world.folder), "-p", str(self.port), "-d", "postgres")
        return (str(PROGRAMS / "psql"), "-XqAt", "-v", "ON_ERROR_STOP=1", *where)

    def execute(self, text: str, *, host: str | None = None) -> subprocess.Popen[bytes]:
        """Run one statement in a session of its own, without waiting for it."""
        argv = (*self.client(host=host), "-c", text)
        return self.world.start(*argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def leave_open(self, text: str, *, host: str | None = None) -> subprocess.Popen[bytes]:
        """Begin a transaction and say no more."""
        process = self.world.start(
            *self.client(host=host), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        say(process, f"BEGIN; {text};\n")
        return process

    def wait_for(self, sessions: int) -> None:
        """Wait until that many other sessions are in a transaction."""
        deadline = time.monotonic() + 20
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND xact_start IS NOT NULL "
            "AND pid <> pg_backend_pid()"
        )
        while int(self.sql(query)) < sessions:
            assert time.monotonic() < deadline, "the sessions did not come up"
            time.sleep(0.05)

    def controldata(self) -> dict[str, str]:
        text = self.world.call(str(PROGRAMS / "pg_controldata"), str(self.directory)).stdout
        return {label: value.strip() for label, _, value in (line.partition(":") for line in text.splitlines())}

    def policy(self) -> ClusterPolicy:
        return ClusterPolicy(
            data_directory=str(self.directory),
            programs=str(PROGRAMS),
            user=USER,
            port=self.port,
            socket_directory=str(self.world.folder),
        )

    def evidence_files(self) -> tuple[bytes | None, ...]:
        paths = [Path(path) for path in PostgreSQL().evidence_paths(self.instance())]
        return tuple(path.read_bytes() if path.exists() else None for path in paths)

    def instance(self) -> Instance:
        return Instance(
            engine="postgresql",
            name=f"{self.directory.name}:{self.port}",
            data_directory=str(self.directory),
            programs=str(PROGRAMS),
            user=USER,
            version=(self.directory / "PG_VERSION").read_text().strip(),
            port=self.port,
            socket_directory=str(self.world.folder),
        )


def say(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text.encode())
    process.stdin.flush()
