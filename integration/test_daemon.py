"""Due runs of a real guest under load: by 'run --due' and by the daemon, each held as its unit holds it."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.installation import Installation, default_policy
from integration.lab.client import LabClient
from integration.lab.guest import LabGuest
from vmsnap.bootstrap import make_world
from vmsnap.config.settings import load_settings

ROOT = Path(__file__).parents[1]


def confined(vmsnap: Installation, *arguments: str, unit: str) -> list[str]:
    """The command as systemd would run it."""
    hold = ["/usr/bin/python3", str(ROOT / "integration" / "confined.py"), str(ROOT / "systemd" / unit)]
    return [*hold, *vmsnap.argv(*arguments)]


def test_what_is_due_is_backed_up_by_the_units_and_a_stop_in_mid_run_leaves_nothing(
    guest: LabGuest, vmsnap: Installation
) -> None:
    factor = max(1.0, guest.lab.time_factor)
    often = default_policy(guest.lab, extra='[schedule]\nevery = "1h"\nretry_after = "1s"\n')
    vmsnap.policy(guest.name, often)
    vmsnap.policy("ghost", often)
    before = guest.domain.XMLDesc(0)
    guest.start_pgbench(clients=1)
    try:
        with LabClient(guest.address()) as client:
            client.wait_for_more(5)
            done = subprocess.run(
                confined(vmsnap, "run", "--due", "--json", unit="vmsnap-run.service"),
                capture_output=True,
                text=True,
                timeout=120 * factor,
                check=False,
            )
            assert done.returncode == 3, done.stdout + done.stderr  # the ghost
            results = {entry["guest"]: entry["result"] for entry in json.loads(done.stdout)["guests"]}
            assert results == {guest.name: "done", "ghost": "failed"}
            again = vmsnap.ok("run", "--due", "--dry-run")
            assert [entry["result"] for entry in again["guests"] if entry["guest"] == guest.name] == ["not-due"]
            guest.stop_pgbench()  # an emulated guest has had its load; the client goes on

            vmsnap.policy(guest.name, often.replace('every = "1h"', 'every = "1s"'))
            with running_daemon(vmsnap) as daemon:
                daemon.wait_for(f"snapshot .* of {re.escape(guest.name)} is stored", timeout_s=120 * factor)
                busy = vmsnap.run("daemon")
                assert busy.exit_code == 4, busy.explain()
                assert "the place of the daemon is held by process" in busy.stderr
                # The next run is due at once. It is stopped where the guest is on its overlay and the clone runs.
                daemon.wait_for(f"{re.escape(guest.name)}: reach clone", times=2, timeout_s=120 * factor)
                daemon.process.send_signal(signal.SIGTERM)
                stopped_at = time.monotonic()
                daemon.process.wait(timeout=60 * factor)
                print(f"stopped after {time.monotonic() - stopped_at:.1f} s")
            client.wait_for_more(5)
    finally:
        guest.stop_pgbench()
    assert daemon.process.returncode == 0, daemon.log()
    said = daemon.log()
    assert "the daemon has ended in order" in said
    assert "the backup of ghost failed (exit code 3)" in said
    assert f"the backup of {guest.name}: stopped" in said
    assert daemon.words[0] == "READY=1"
    assert "WATCHDOG=1" in daemon.words
    assert "STOPPING=1" in daemon.words
    assert len(vmsnap.ok("list", guest.name)["snapshots"]) == 2
    found = vmsnap.ok("reconcile")
    assert (found["runs"], found["undone"], found["unknown"], found["complete"]) == ([], [], [], True)
    assert _sources(guest.domain.XMLDesc(0)) == _sources(before)


def test_each_run_gives_its_connection_back(vmsnap: Installation) -> None:
    """The daemon opens drivers for each run: a month of them must not use up what a process may have open."""
    settings = load_settings(vmsnap.config)
    counts = []
    for number in range(60):
        make_world(settings).hypervisor.guests()
        if number in (9, 59):
            gc.collect()
            counts.append(len([*Path("/proc/self/fd").iterdir(), *Path("/proc/self/task").iterdir()]))
    # libvirt's own thread closes them, a moment later.
    assert counts[1] <= counts[0] + 3


class RunningDaemon:
    """``vmsnap daemon`` with a log file, and the other end of its notification socket."""

    def __init__(self, process: subprocess.Popen[bytes], *, log: Path) -> None:
        self.process = process
        self._log = log
        self.words: list[str] = []

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str, *, times: int = 1, timeout_s: float) -> None:
        """Wait until so many lines of the log match."""
        end = time.monotonic() + timeout_s
        while len(re.findall(pattern, self.log())) < times:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, f"'{pattern}' did not come\n{self.log()}"
            time.sleep(0.2)


@contextmanager
def running_daemon(vmsnap: Installation) -> Iterator[RunningDaemon]:
    vmsnap.write_config(extra='[daemon]\ntick = "1s"')
    log = vmsnap.folder / "daemon.log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, log.open("wb") as stream:
        manager.bind(str(vmsnap.folder / "notify"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(vmsnap.folder / "notify"), "WATCHDOG_USEC": "60000000"}
        process = subprocess.Popen(
            confined(vmsnap, "daemon", unit="vmsnap.service"), stderr=stream, stdout=stream, env=environment
        )
        daemon = RunningDaemon(process, log=log)

        def listen() -> None:
            while (said := manager.recv(4096).decode()) != "end":
                daemon.words.extend(said.split("\n"))

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield daemon
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=60 * max(1.0, vmsnap.lab.time_factor))
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"end", str(vmsnap.folder / "notify"))
            listener.join()


def _sources(xml: str) -> list[str]:
    return [line.strip() for line in xml.splitlines() if "<source file=" in line or "<source dev=" in line]
