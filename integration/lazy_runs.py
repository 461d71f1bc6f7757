"""How quick an environment straight from the replica is, measured on a real guest: for tests and for the benchmark."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from integration.installation import Installation, RunningVm
from integration.lab.guest import LabGuest
from vmsnap.hypervisors.libvirt.processes import pid_of

_PATIENCE_S = 120.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class LazyNumbers:
    """``lazy_running_s``: from the start of the command until the VM ran. ``first_sql_s``: until its database answered.

    ``lazy_read_share_at_first_sql``: which part of the image's data had been read from the replica by then.
    """

    environment: str
    lazy_running_s: float
    first_sql_s: float
    lazy_read_share_at_first_sql: float
    read_bytes_at_first_sql: int
    data_bytes: int


def first_sql_from_replica(
    vmsnap: Installation,
    guest: LabGuest,
    reference: str,
    *,
    name: str = "lazy",
    on_the_way: Callable[[], None] = lambda: None,
) -> LazyNumbers:
    """Provision a snapshot of the guest from the replica, wait for its first SQL answer, and then for all of its data.

    ``on_the_way`` is called while it boots. The environment stays, local.
    """
    began = time.monotonic()
    command = vmsnap.start("provision", reference, "--from", "replica", "--name", name)
    running_s = _until_running(guest, name=name, began=began, still=lambda: command.poll() in (None, 0))
    said, _ = command.communicate(timeout=_PATIENCE_S)
    assert command.returncode == 0, said
    print(said)
    on_the_way()
    vm = RunningVm(guest, name=name)
    vm.wait_for_postgresql()
    assert vm.psql("SELECT count(*) >= 0 FROM markers") == "t"
    first_sql_s = time.monotonic() - began
    read_bytes = export_of(vmsnap, name)["read_bytes"]
    done = vmsnap.run("env", "hydrate", name)
    assert done.exit_code == 0, done.explain()
    data_bytes = export_of(vmsnap, name)["data_bytes"]
    return LazyNumbers(
        environment=name,
        lazy_running_s=running_s,
        first_sql_s=first_sql_s,
        lazy_read_share_at_first_sql=read_bytes / data_bytes,
        read_bytes_at_first_sql=read_bytes,
        data_bytes=data_bytes,
    )


def _until_running(guest: LabGuest, *, name: str, began: float, still: Callable[[], bool]) -> float:
    while time.monotonic() - began < _PATIENCE_S and still():
        with contextlib.suppress(libvirt.libvirtError):
            if guest.connection.lookupByName(name).state()[0] == libvirt.VIR_DOMAIN_RUNNING:
                return time.monotonic() - began
        time.sleep(_POLL_S / 10)
    return time.monotonic() - began


def export_of(vmsnap: Installation, name: str) -> dict[str, Any]:
    """What ``env show`` says of an environment's export."""
    found: dict[str, Any] = vmsnap.ok("env", "show", name)["export"]
    return found


def kill_export(vmsnap: Installation, name: str) -> None:
    """Kill an environment's export, as a crash would."""
    lock = vmsnap.store / ".exports" / export_of(vmsnap, name)["run"] / "lock"
    os.kill(int(lock.read_bytes()), signal.SIGKILL)
    until = time.monotonic() + _PATIENCE_S
    while export_of(vmsnap, name)["alive"]:
        assert time.monotonic() < until
        time.sleep(_POLL_S)


def open_files_of(name: str) -> list[str]:
    """What a VM's process has open."""
    pid = pid_of(name)
    assert pid is not None
    return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
