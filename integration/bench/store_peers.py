"""restic and BorgBackup, for comparison: a repository in a directory, encrypted and compressed, of one image."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_LIMIT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One program. ``prepare`` makes its repository; ``{repository}``, ``{image}``, ``{target}`` and ``{name}`` are filled in."""

    prepare: tuple[str, ...]
    backup: tuple[str, ...]
    restore: tuple[str, ...]
    environment: dict[str, str]


RESTIC = Peer(
    prepare=("restic", "-q", "-r", "{repository}", "init", "--repository-version", "2"),
    backup=("restic", "-q", "-r", "{repository}", "--compression", "auto", "backup", "{image}"),
    restore=("restic", "-q", "-r", "{repository}", "restore", "latest", "--target", "{target}"),
    environment={"RESTIC_PASSWORD": "bench"},
)
BORG = Peer(
    prepare=("borg", "init", "--encryption", "repokey-blake2", "{repository}"),
    backup=("borg", "create", "--compression", "zstd,3", "{repository}::{name}", "{image}"),
    restore=("borg", "extract", "{repository}::{name}"),
    environment={"BORG_PASSPHRASE": "bench", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"},
)


class Repository:
    """A peer's repository, with caches of its own, in ``folder``."""

    def __init__(self, peer: Peer, *, folder: Path) -> None:
        self._peer = peer
        self._folder = folder
        self._backups = 0
        (folder / "home").mkdir(parents=True)
        self._run(peer.prepare)

    @property
    def bytes(self) -> int:
        """What the repository has on the disk."""
        return folder_bytes(self._folder / "repository")

    def backup(self, image: Path) -> float:
        """Back an image up; return how many seconds that took."""
        self._backups += 1
        return self._run(self._peer.backup, image=str(image))

    def restore(self, target: Path) -> float:
        """Restore the newest backup, and wait until it is on the disk; return how many seconds that took."""
        target.mkdir()
        took = self._run(self._peer.restore, target=str(target), folder=target)
        began = time.monotonic()
        subprocess.run(["sync", "--file-system", target], check=True, timeout=_LIMIT_S)
        return took + time.monotonic() - began

    def _run(self, command: tuple[str, ...], *, image: str = "", target: str = "", folder: Path | None = None) -> float:
        words = {
            "{repository}": str(self._folder / "repository"),
            "{image}": image,
            "{target}": target,
            "{name}": str(self._backups),
        }
        line = []
        for word in command:
            for place, value in words.items():
                word = word.replace(place, value)  # noqa: PLW2901
            line.append(word)
        home = str(self._folder / "home")
        environment = {**os.environ, **self._peer.environment, "HOME": home, "XDG_CACHE_HOME": home}
        began = time.monotonic()
        where = folder or self._folder
        subprocess.run(line, env=environment, cwd=where, check=True, timeout=_LIMIT_S, capture_output=True)
        return time.monotonic() - began


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
