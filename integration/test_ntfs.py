"""NTFS volumes that ntfs-3g made and filled, read without it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.ntfs_volumes import log_place, make, mounted, patch, restart_page
from vmsnap.disks import ntfs
from vmsnap.errors import PreconditionError, ToolError

MIB = 1 << 20
CONTROL = "/Program Files/PostgreSQL/15/data/global/pg_control"


def fill(folder: Path) -> dict[str, bytes]:
    """Write files of all sorts; return what they hold, by their paths."""
    content = random.Random(15).randbytes
    files = {
        CONTROL: content(8192),
        "/empty": b"",
        "/resident": b"x" * 100,
        "/größer/und tiefer/ein Name mit Leerzeichen.txt": content(70_000),
        "/sparse": bytes(300_000) + content(5000) + bytes(200_000),
        **{
            f"/many/{number:05} a rather long name, so that a folder has many blocks": b"%d" % number
            for number in range(800)
        },
    }
    for path, data in files.items():
        place = folder / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    # In turns, so that both have many runs, and their attributes lists.
    with (folder / "one").open("wb") as one, (folder / "two").open("wb") as two:
        for _ in range(200):
            for file in (one, two):
                file.write(content(4096))
                file.flush()
    files |= {f"/{name}": (folder / name).read_bytes() for name in ("one", "two")}
    (folder / "large").write_bytes(bytes(2 * MIB))
    (folder / "link").symlink_to("empty")
    return files


Volume = tuple[Path, dict[str, bytes]]


def make_volume(folder: Path, *, cluster_bytes: int) -> Volume:
    image = folder / "volume.img"
    make(image, size_bytes=48 * MIB, cluster_bytes=cluster_bytes)
    with mounted(image, at=folder / "mounted") as place:
        files = fill(place)
    return image, files


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return make_volume(tmp_path_factory.mktemp("ntfs"), cluster_bytes=4096)


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536])
def test_files_read_as_they_were_written(tmp_path: Path, cluster_bytes: int) -> None:
    image, files = make_volume(tmp_path, cluster_bytes=cluster_bytes)
    rarely = [path for number, path in enumerate(files) if number < 30 or number % 20 == 0]
    wrong = [path for path in (*rarely, "/one", "/two") if ntfs.read_file(image, offset=0, path=path) != files[path]]
    assert wrong == []


def test_names_are_found_whatever_their_case(volume: Volume) -> None:
    image, files = volume
    assert ntfs.read_file(image, offset=0, path=CONTROL.upper()) == files[CONTROL]
    assert ntfs.read_file(image, offset=0, path="/program files/nobody") is None
    assert ntfs.read_file(image, offset=0, path="/nobody/at all") is None


@pytest.mark.parametrize("path", ["/", "/many", "/empty/below", "/large", "relative", "/../empty"])
def test_what_is_no_small_plain_file_is_refused(volume: Volume, path: str) -> None:
    with pytest.raises(PreconditionError):
        ntfs.read_file(volume[0], offset=0, path=path)


def test_a_volume_may_begin_anywhere_on_a_disk(volume: Volume, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB) + volume[0].read_bytes())
    assert ntfs.read_file(disk, offset=MIB, path=CONTROL) == volume[1][CONTROL]
    assert ntfs.state(disk, offset=MIB).clean


@pytest.fixture
def copy(volume: Volume, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.write_bytes(volume[0].read_bytes())
    return copy


def test_a_volume_that_was_dismounted_is_clean(volume: Volume) -> None:
    assert ntfs.state(volume[0], offset=0).clean


def in_record(image: Path, number: int) -> int:
    """Return where a file's record lies. The first records of the table of files are in one piece."""
    boot = image.read_bytes()[:512]
    sector, per_cluster = struct.unpack_from("<HB", boot, 11)
    cluster = sector * (per_cluster if per_cluster <= 0x80 else 1 << (256 - per_cluster))
    (mft,) = struct.unpack_from("<Q", boot, 48)
    (record,) = struct.unpack_from("<b", boot, 64)
    return int(mft * cluster + number * (1 << -record if record < 0 else record * cluster))


@pytest.mark.parametrize(
    ("pages", "clean", "word"),
    [
        ([restart_page(), restart_page(number=4)], True, "closed"),
        ([restart_page(in_use=0, flags=2), restart_page(number=4, in_use=0)], True, "closed"),
        ([restart_page(in_use=0), restart_page(number=4)], False, "in use"),
        ([restart_page(number=4), restart_page(in_use=0)], False, "in use"),
        ([restart_page(version=(2, 0), flags=2), restart_page(number=4)], False, "fast restart"),
        ([restart_page(version=(3, 1)), restart_page(number=4)], False, "3.1"),
        ([b"CHKD" + restart_page()[4:], b"CHKD" + restart_page()[4:]], False, "chkdsk"),
        ([bytes(4096), bytes(4096)], False, "damaged"),
        ([restart_page()[:600] + bytes(3496), restart_page()], False, "damaged"),
    ],
)
def test_the_journal_tells_whether_it_was_dismounted(copy: Path, pages: list[bytes], clean: bool, word: str) -> None:  # noqa: FBT001
    patch(copy, log_place(copy), b"".join(pages))
    verdict = ntfs.state(copy, offset=0)
    assert (verdict.clean, word in verdict.observed) == (clean, True), verdict


@pytest.mark.parametrize(("flags", "word"), [(1, "dirty"), (0x4000, "chkdsk"), (4, "upgrade")])
def test_the_flags_of_the_volume_count(copy: Path, flags: int, word: str) -> None:
    place = in_record(copy, 3)
    record = copy.read_bytes()[place : place + 1024]
    patch(copy, place + record.index(b"\x03\x01\x00\x00", 56) + 2, struct.pack("<H", flags))
    verdict = ntfs.state(copy, offset=0)
    assert not verdict.clean
    assert word in verdict.observed


@pytest.mark.parametrize(("start", "clean"), [(b"hibr", False), (b"HIBR", False), (b"wake", True), (b"\0\0\0\0", True)])
def test_a_hibernated_system_was_not_shut_down(copy: Path, tmp_path: Path, start: bytes, clean: bool) -> None:  # noqa: FBT001
    with mounted(copy, at=tmp_path / "mounted") as place:
        (place / "hiberfil.sys").write_bytes(start + bytes(100_000))
    assert ntfs.state(copy, offset=0).clean is clean


def test_no_damage_breaks_the_reader(volume: Volume, tmp_path: Path) -> None:
    """Whatever a guest writes into its metadata, there is a verdict or an error of vmsnap, in bounded time."""
    whole = volume[0].read_bytes()
    chance = random.Random(7)
    places = [0, *(in_record(volume[0], number) for number in (0, 2, 3, 5))]
    copy = tmp_path / "copy"
    copy.write_bytes(whole)
    refused = 0
    for _ in range(300):
        start = chance.choice(places)
        at = [start + chance.randrange(512) for _ in range(chance.choice((1, 1, 3, 12)))]
        for place in at:
            patch(copy, place, bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))]))
        looks: tuple[Callable[[], object], ...] = (
            lambda: ntfs.state(copy, offset=0),
            lambda: ntfs.read_file(copy, offset=0, path=CONTROL),
        )
        for look in looks:
            try:
                look()
            except (ToolError, PreconditionError):
                refused += 1
        for place in at:
            patch(copy, place, whole[place : place + 1])
    assert refused > 30
