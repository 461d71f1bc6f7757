"""Ways to look at guests from outside: over SSH where there is no agent, and file systems of a size of one's own."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from integration.lab.commands import LabError, run
from integration.lab.guest import BOOT_LIMIT_S, LabGuest, Result
from integration.lab.lab import Lab


def over_ssh(
    lab: Lab, address: str, command: Sequence[str], *, text: str = "", timeout_s: float = 30.0, key: Path | None = None
) -> Result:
    """Run a command as root at an address of the lab, with OpenSSH's client, whatever its exit status."""
    options = ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    argv = ["ssh", "-F", "none", "-i", str(key or lab.image.private_key), "-o", "IdentitiesOnly=yes"]
    for option in (*options, f"ConnectTimeout={int(10 * lab.time_factor)}"):
        argv += ["-o", option]
    argv += [f"root@{address}", shlex.join(command)]
    try:
        done = subprocess.run(
            argv,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s * lab.time_factor,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{list(command)} still runs at {address}") from error
    return Result(exit_status=done.returncode, stdout=done.stdout, stderr=done.stderr)


class SshGuest(LabGuest):
    """A guest whose agent is missing or broken: everything inside it is done over SSH."""

    def wait_for_agent(self, *, limit_s: float = BOOT_LIMIT_S) -> None:
        """Wait until a command can be run over SSH."""
        self._wait("SSH server", lambda: self.run(["true"]), limit_s=limit_s)

    def exec(self, command: Sequence[str], *, text: str = "", timeout_s: float = 30.0) -> Result:
        return over_ssh(self.lab, self.address(), command, text=text, timeout_s=timeout_s)


@contextmanager
def file_system(lab: Lab, name: str, *, kind: str, size_mib: int) -> Iterator[Path]:
    """A file system of its own ('xfs' has reflinks, 'ext4' has none) in a sparse file, mounted; removed afterwards."""
    backing, folder = lab.scratch / f"{name}.img", lab.scratch / name
    run(["truncate", "--size", f"{size_mib}M", backing])
    options = {"xfs": ["-q", "-m", "reflink=1"], "ext4": ["-q", "-m", "0"]}[kind]
    run([f"mkfs.{kind}", *options, backing])
    folder.mkdir()
    run(["mount", "-o", "loop", backing, folder])
    try:
        yield folder
    finally:
        run(["umount", folder])
        shutil.rmtree(folder)
        backing.unlink()


def fill(folder: Path, *, leave_mib: int) -> Path:
    """Take room on a folder's file system until so much is left; returns the file to remove."""
    path = folder / ".taken"
    size = shutil.disk_usage(folder).free - (leave_mib << 20)
    run(["fallocate", "--length", str(size), path])
    return path
