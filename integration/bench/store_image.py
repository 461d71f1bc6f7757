"""A raw image with a file system full of PostgreSQL's own files, for the benchmark of stores."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.lab.commands import run

PAGE_BYTES = 8192
_MIB = 1024 * 1024
_PROGRAMS = Path("/usr/lib/postgresql/15/bin")
_USER = "postgres"
# What they come to on the disk, with their indexes.
_MIB_PER_SCALE = 15.0
_MIB_PER_THOUSAND_ORDERS = 0.29
_ORDERS = """
CREATE TABLE orders AS SELECT i AS id, md5(i::text) AS key,
  'order ' || (i::bigint * 7919 % 100003) || ' of ' || md5((i % 5000)::text) || ', shipped to ' || md5((i % 70001)::text) AS body,
  now() - (i || ' seconds')::interval AS at, (random() * 1000)::numeric(10, 2) AS amount
FROM generate_series(1, {rows}) AS i;
CREATE INDEX ON orders (key);
"""


def make_image(path: Path, *, size_mib: int, folder: Path) -> None:
    """Make a raw image with ext4, and on it a PostgreSQL cluster that fills about three quarters of it.

    Half of the data is of `pgbench -i`, half a table of texts and numbers that compress less. The cluster was stopped in order.
    """
    with path.open("wb") as file:
        file.truncate(size_mib * _MIB)
    run(["mkfs.ext4", "-q", "-F", path], timeout_s=120)
    mount = folder / "mounted"
    mount.mkdir()
    mount.chmod(0o755)
    run(["mount", "-o", "loop", path, mount])
    try:
        _fill(mount, mib=size_mib * 0.72)
    finally:
        run(["umount", mount], timeout_s=300)
        mount.rmdir()


def _fill(mount: Path, *, mib: float) -> None:
    data, sockets = mount / "data", mount / "run"
    for one in (data, sockets):
        one.mkdir()
        shutil.chown(one, _USER)
    run([*_as_user(), _PROGRAMS / "initdb", "-D", data, "-A", "trust", "--no-sync"], timeout_s=300)
    options = f"-c unix_socket_directories={sockets} -c listen_addresses= -c fsync=off -c max_wal_size=256MB -c wal_level=minimal"
    control = [*_as_user(), _PROGRAMS / "pg_ctl", "-D", data, "-w", "-t", "300"]
    options += " -c max_wal_senders=0 -c maintenance_work_mem=256MB"
    run([*control, "-o", options, "-l", data / "log", "start"], timeout_s=300)
    try:
        scale = max(1, round(mib / 2 / _MIB_PER_SCALE))
        run([*_as_user(), _PROGRAMS / "createdb", "-h", sockets, "bench"], timeout_s=120)
        run([*_as_user(), _PROGRAMS / "pgbench", "-h", sockets, "-i", "-q", "-s", str(scale), "bench"], timeout_s=3600)
        rows = round(mib / 2 / _MIB_PER_THOUSAND_ORDERS * 1000)
        psql = [
            *_as_user(),
            _PROGRAMS / "psql",
            "-h",
            sockets,
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            _ORDERS.format(rows=rows),
        ]
        run([*psql, "bench"], timeout_s=3600)
    finally:
        run([*control, "stop"], timeout_s=600)


def _as_user() -> list[str | Path]:
    return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]


def change_pages(path: Path, *, share: float, seed: int = 1) -> list[int]:
    """Write such a share of the pages of 8 KiB that hold data anew, at random; return their numbers.

    A tenth of each page changes, as rows do: the rest of it stays.
    """
    chance = random.Random(seed)
    with path.open("r+b") as file:
        pages = [page for start, end in _data(file.fileno()) for page in range(start // PAGE_BYTES, end // PAGE_BYTES)]
        chosen = sorted(chance.sample(pages, max(1, round(len(pages) * share))))
        for page in chosen:
            file.seek(page * PAGE_BYTES + chance.randrange(PAGE_BYTES - 800))
            file.write(chance.randbytes(800))
        file.flush()
        os.fsync(file.fileno())
    return chosen


def _data(descriptor: int) -> Iterator[tuple[int, int]]:
    end = 0
    size = os.fstat(descriptor).st_size
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield -(-start // PAGE_BYTES) * PAGE_BYTES, end


@contextmanager
def reflinks(folder: Path, *, size_mib: int) -> Iterator[Path]:
    """Mount an empty XFS with reflinks of that size, in a sparse file."""
    backing, mount = folder / "bench.xfs", folder / "xfs"
    mount.mkdir()
    with backing.open("wb") as file:
        file.truncate(size_mib * _MIB)
    run(["mkfs.xfs", "-q", "-m", "reflink=1", backing])
    run(["mount", "-o", "loop", backing, mount])
    try:
        yield mount
    finally:
        run(["umount", mount], timeout_s=300)
        backing.unlink()
        mount.rmdir()
