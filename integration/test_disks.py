"""Views of real images by QEMU, and real file systems looked into through them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.disks.daemon import mounts_below
from vmsnap.disks.export import QemuExport
from vmsnap.disks.filesystems import OfflineInspector
from vmsnap.errors import DriverError, PreconditionError, ToolError
from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import FileSystemState
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.ports.disks import DiskView, FileRequest

MIB = 1 << 20
MINUTE = timedelta(minutes=1)
STRANGE_FOLDER = 'strange, "quoted" = é'

OpenImages = Callable[..., tuple[DiskView, ...]]


def run(*argv: str | Path, stdin: str = "") -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        input=stdin,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LC_ALL": "C", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )
    return done.stdout


def image_of(path: Path, *, target: str = "vda", image_format: str | None = None) -> DiskImage:
    image_format = image_format or path.suffix.removeprefix(".")
    return DiskImage(target=target, path=str(path), image_format=image_format, size_bytes=0)


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return tmp_path / STRANGE_FOLDER


@pytest.fixture
def export(runtime: Path) -> QemuExport:
    return QemuExport(runtime_dir=runtime)


@pytest.fixture
def open_images(export: QemuExport) -> Iterator[OpenImages]:
    runs: list[RunId] = []

    def open_them(*images: DiskImage) -> tuple[DiskView, ...]:
        runs.append(new_run_id())
        return export.open(runs[-1], images=images)

    yield open_them
    for identity in runs:
        export.release(export.resource(identity, guest="g"), deadline=MINUTE)
    assert export.owned() == ()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / 'var lib/"data" é').mkdir(parents=True)
    (tree / 'var lib/"data" é/pg_control').write_bytes(b"control\0\n" * 1000)
    (tree / "random").write_bytes(os.urandom(900_000))
    (tree / "sparse").touch()
    os.truncate(tree / "sparse", 100_000)
    with (tree / "sparse").open("r+b") as file:
        file.seek(70_000)
        file.write(b"end of a hole")
    (tree / "large").write_bytes(bytes(MIB + 1))
    (tree / "empty").touch()
    (tree / "link").symlink_to("random")
    (tree / "folder-link").symlink_to("var lib")
    (tree / "many").mkdir()
    for number in range(500):
        (tree / "many" / f"a rather long name that fills blocks {number}").write_text(str(number))
    return tree


def make_ext4(path: Path, *, tree: Path, kind: str = "ext4") -> Path:
    path.touch()
    os.truncate(path, 64 * MIB)
    run(f"mkfs.{kind}", "-q", "-F", "-d", tree, path)
    return path


def make_xfs(path: Path, *, tree: Path, folder: Path) -> Path:
    path.touch()
    os.truncate(path, 320 * MIB)
    run("mkfs.xfs", "-q", path)
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop", path, folder)
    try:
        shutil.copytree(tree, folder, dirs_exist_ok=True, symlinks=True)
    finally:
        run("umount", folder)
    return path


def states(views: tuple[DiskView, ...]) -> tuple[FileSystemState, ...]:
    return OfflineInspector().file_systems(views, timeout=MINUTE)


def read(views: tuple[DiskView, ...], uuid: str, path: str) -> bytes | None:
    request = FileRequest(file_system_uuid=uuid, path=path)
    (content,) = OfflineInspector().read_files(views, requests=(request,), timeout=MINUTE)
    assert content.request == request
    return content.content


def assert_reads_files(views: tuple[DiskView, ...], uuid: str, *, tree: Path) -> None:
    names = ['/var lib/"data" é/pg_control', "/random", "/sparse", "/empty"]
    names.append("/many/a rather long name that fills blocks 321")
    for name in names:
        assert read(views, uuid, name) == (tree / name[1:]).read_bytes(), name
    for name in ("/none", "/none/below", "/many/none"):
        assert read(views, uuid, name) is None
    for name in ("/link", "/folder-link/none", "/many", "/", "/random/below", "/large", "relative", "/a\nb"):
        with pytest.raises(PreconditionError) as caught:
            read(views, uuid, name)
        assert caught.value.remedy


def gone(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return True
    return False


# Views.


@pytest.mark.parametrize(
    "name", ["plain", "comma,comma", 'json:{"driver":"null-co"}', "nbd:localhost:1", "a b'\"\\", "é%s", "?offset=512"]
)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_view_has_the_bytes_of_the_disk_whatever_its_name(
    open_images: OpenImages, tmp_path: Path, name: str, image_format: str
) -> None:
    content = os.urandom(3 * MIB) + bytes(10 * MIB) + os.urandom(MIB)
    (tmp_path / "content").write_bytes(content)
    path = tmp_path / name
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, tmp_path / "content", f"file:{path}")
    (view,) = open_images(image_of(path, image_format=image_format))
    assert view.path.read_bytes() == content
    assert view.size_bytes == len(content)
    found = list(view.extents())
    assert [byte.offset for byte in found] == [0, *(one.offset + one.length for one in found[:-1])]
    assert found[-1].offset + found[-1].length == len(content)
    assert sum(one.length for one in found if one.data) <= 5 * MIB
    assert list(view.extents()) == found


def test_a_chain_of_overlays_reads_as_one_disk(open_images: OpenImages, tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"b" * MIB + bytes(MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 65536 65536", "-c", "write -z 131072 65536", top)
    (view,) = open_images(image_of(top))
    expected = b"b" * 65536 + b"\1" * 65536 + bytes(65536) + b"b" * (MIB - 3 * 65536) + bytes(MIB)
    assert view.path.read_bytes() == expected
    for one in view.extents():
        assert one.data or not any(expected[one.offset : one.offset + one.length])


@pytest.mark.parametrize("over_it", [False, True])
def test_a_block_device_and_an_overlay_over_one(
    open_images: OpenImages,
    tmp_path: Path,
    over_it: bool,  # noqa: FBT001
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB) + bytes(MIB))
    device = Path(run("losetup", "--find", "--show", "--read-only", path).strip())
    try:
        image = image_of(device, image_format="raw")
        if over_it:
            image = image_of(tmp_path / "top.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", device, "-F", "raw", image.path)
        (view,) = open_images(image)
        assert view.path.read_bytes() == path.read_bytes()
        assert sum(one.length for one in view.extents()) == 2 * MIB
    finally:
        run("losetup", "--detach", device)


def test_a_view_cannot_be_written_and_is_for_root_alone(open_images: OpenImages, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    (view,) = open_images(image_of(path))
    assert view.path.stat().st_mode & 0o777 == 0o400
    assert view.path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(OSError), view.path.open("r+b") as file:  # noqa: PT011
        file.write(b"x")


def test_several_disks_are_opened_in_order(open_images: OpenImages, tmp_path: Path) -> None:
    images = []
    for index, target in enumerate(("vda", "vd/b", "é c")):
        path = tmp_path / f"{index}.raw"
        path.write_bytes(bytes([index + 1]) * MIB)
        images.append(image_of(path, target=target))
    views = open_images(*images)
    assert [(view.target, view.path.read_bytes()[:1]) for view in views] == [
        ("vda", b"\1"),
        ("vd/b", b"\2"),
        ("é c", b"\3"),
    ]


def test_an_image_that_somebody_writes_to_is_refused(
    export: QemuExport, open_images: OpenImages, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdout.read(1)  # Its prompt: it has opened the image.
        with pytest.raises(ToolError, match="lock") as caught:
            open_images(image_of(path))
        assert caught.value.remedy is not None
        assert "must not change" in caught.value.remedy
        writer.stdin.close()
    views = open_images(image_of(path))
    assert views[0].size_bytes == MIB
    refused = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)], capture_output=True, check=False, timeout=60
    )
    assert b"lock" in refused.stderr


@pytest.mark.parametrize("content", [None, b"", b"no qcow2"])
def test_an_image_that_cannot_be_opened_is_an_error_that_leaves_nothing(
    export: QemuExport, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "disk.qcow2"
    if content is not None:
        path.write_bytes(content)
    identity = new_run_id()
    with pytest.raises(DriverError):
        export.open(identity, images=(image_of(path),))
    export.release(export.resource(identity, guest="g"), deadline=MINUTE)
    assert export.owned() == ()


def test_other_formats_are_refused(export: QemuExport, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="vmdk"):
        export.open(new_run_id(), images=(image_of(tmp_path / "disk.vmdk"),))
    assert export.owned() == ()


def test_releasing_what_was_never_made_is_content(export: QemuExport) -> None:
    export.release(export.resource(new_run_id(), guest="g"), deadline=MINUTE)
    assert export.owned() == ()


def test_releasing_twice_and_while_a_view_is_open(export: QemuExport, runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    identity = new_run_id()
    (view,) = export.open(identity, images=(image_of(path),))
    assert export.owned() == (export.resource(identity, guest=""),)
    reader = os.open(view.path, os.O_RDONLY)
    export.release(export.resource(identity, guest="g"), deadline=MINUTE)
    export.release(export.resource(identity, guest="g"), deadline=MINUTE)
    with suppress(OSError):  # Whatever is behind the file, closing it says that it is gone.
        os.close(reader)
    assert export.owned() == ()
    assert mounts_below(runtime) == []
    assert list(runtime.iterdir()) == []


def test_a_killed_daemon_is_cleaned_up_after(export: QemuExport, runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    identity = new_run_id()
    (view,) = export.open(identity, images=(image_of(path),))
    os.kill(int((view.path.parent / "daemon.pid").read_text()), signal.SIGKILL)
    while not gone(view.path):
        time.sleep(0.01)
    export.release(export.resource(identity, guest="g"), deadline=MINUTE)
    assert mounts_below(runtime) == []
    assert list(runtime.iterdir()) == []


def test_a_killed_run_leaves_no_daemon_and_is_cleaned_up_by_another_process(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    script = """
        import os, signal, sys
        from pathlib import Path
        from vmsnap.disks.export import QemuExport
        from vmsnap.model.capture import DiskImage
        image = DiskImage(target="vda", path=sys.argv[2], image_format="raw", size_bytes=0)
        views = QemuExport(runtime_dir=Path(sys.argv[1])).open("0123456789", images=(image,))
        print(views[0].path.with_name("daemon.pid").read_text(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    argv = [sys.executable, "-c", textwrap.dedent(script), str(runtime), str(path)]
    died = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr
    daemon = Path("/proc") / died.stdout.strip()
    deadline = time.monotonic() + 10
    while daemon.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not daemon.exists()
    export = QemuExport(runtime_dir=runtime)
    (resource,) = export.owned()
    assert resource == export.resource(RunId("0123456789"), guest="")
    export.release(resource, deadline=MINUTE)
    assert export.owned() == ()
    assert mounts_below(runtime) == []


def test_a_daemon_that_outlived_its_run_is_ended(export: QemuExport, runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    identity = new_run_id()
    (view,) = export.open(identity, images=(image_of(path),))
    daemon = int((view.path.parent / "daemon.pid").read_text())
    another = QemuExport(runtime_dir=runtime)
    another.release(another.resource(identity, guest="g"), deadline=MINUTE)
    assert Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # this process's child
    assert mounts_below(runtime) == []
    export.release(export.resource(identity, guest="g"), deadline=MINUTE)


# File systems.


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_ext_files_are_read(open_images: OpenImages, tmp_path: Path, tree: Path, kind: str) -> None:
    views = open_images(image_of(make_ext4(tmp_path / "disk.raw", tree=tree, kind=kind)))
    (state,) = states(views)
    assert (state.disk, state.kind, state.clean) == ("vda", kind, True)
    assert state.observed == "whole disk: state clean, 0 errors"
    assert_reads_files(views, state.uuid, tree=tree)
    assert read(views, state.uuid.upper(), "/empty") == b""


@pytest.mark.parametrize(
    ("request_text", "observed"),
    [
        ("feature needs_recovery", "needs_recovery"),
        ("set_super_value state 0", "not clean"),
        ("set_super_value state 3", "clean with errors"),
        ("set_super_value error_count 2", "2 errors"),
    ],
)
def test_ext4_that_was_not_left_in_order(
    open_images: OpenImages, tmp_path: Path, tree: Path, request_text: str, observed: str
) -> None:
    path = make_ext4(tmp_path / "disk.raw", tree=tree)
    run("debugfs", "-w", "-R", request_text, path)
    (state,) = states(open_images(image_of(path)))
    assert not state.clean
    assert observed in state.observed


def test_ext4_and_xfs_that_were_in_use(open_images: OpenImages, tmp_path: Path, tree: Path) -> None:
    disks = [make_ext4(tmp_path / "a.raw", tree=tree), make_xfs(tmp_path / "b.raw", tree=tree, folder=tmp_path / "m")]
    pulled = []
    for disk in disks:
        run("mount", "-o", "loop", disk, tmp_path / "m")
        try:
            (tmp_path / "m" / "new").write_text("written")
            run("sync", "-f", tmp_path / "m")
            pulled.append(Path(shutil.copyfile(disk, disk.with_name(f"pulled-{disk.name}"))))
        finally:
            run("umount", tmp_path / "m")
    found = states(open_images(*(image_of(path) for path in pulled)))
    assert [state.clean for state in found] == [False, False]
    assert "needs_recovery" in found[0].observed
    assert "DIRTY" in found[1].observed
    assert [state.clean for state in states(open_images(*(image_of(path) for path in disks)))] == [True, True]


def test_a_partitioned_disk_with_several_file_systems(open_images: OpenImages, tmp_path: Path, tree: Path) -> None:
    parts = {
        "ext4": make_ext4(tmp_path / "ext4.part", tree=tree),
        "xfs": make_xfs(tmp_path / "xfs.part", tree=tree, folder=tmp_path / "m"),
        "vfat": tmp_path / "vfat.part",
        "swap": tmp_path / "swap.part",
        "btrfs": tmp_path / "btrfs.part",
        "empty": tmp_path / "empty.part",
        "rubbish": tmp_path / "rubbish.part",
    }
    for name in ("vfat", "swap", "btrfs", "empty", "rubbish"):
        parts[name].touch()
        os.truncate(parts[name], (112 if name == "btrfs" else 40) * MIB)
    run("mkfs.vfat", "-F", "32", parts["vfat"])
    run("mkswap", "-q", parts["swap"])
    run("mkfs.btrfs", "-q", parts["btrfs"])
    with parts["rubbish"].open("r+b") as file:
        file.seek(5 * MIB)
        file.write(os.urandom(4096))
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 2 + 2 * MIB + sum(path.stat().st_size for path in parts.values()))
    lines = ["label: gpt", "size=1MiB,start=2048,type=21686148-6449-6E6F-744E-656564454649"]
    os.truncate(disk, 1024 * MIB)
    lines += [f"size={path.stat().st_size // MIB}MiB" for path in parts.values()]
    run("sfdisk", "-q", disk, stdin="\n".join(lines))
    offset = 2 * MIB
    with disk.open("r+b") as target:
        target.seek(MIB)
        target.write(b"boot code")
        for path in parts.values():
            target.seek(offset)
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)
            offset += path.stat().st_size
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", top)
    views = open_images(image_of(top))
    found = {state.kind: state for state in states(views)}
    assert {kind: (state.clean, state.observed) for kind, state in found.items()} == {
        "ext4": (True, "partition 2: state clean, 0 errors"),
        "xfs": (True, "partition 3: log CLEAN"),
        "vfat": (True, "partition 4: no dirty flag"),
        "btrfs": (True, "partition 6: log_root 0"),
        "unknown": (False, "partition 8: data without a known file system"),
    }
    assert_reads_files(views, found["ext4"].uuid, tree=tree)
    assert_reads_files(views, found["xfs"].uuid, tree=tree)
    with pytest.raises(PreconditionError, match="btrfs"):
        read(views, found["btrfs"].uuid, "/x")
    with pytest.raises(PreconditionError, match="none of the disks") as caught:
        read(views, "00000000-0000-0000-0000-000000000000", "/x")
    assert caught.value.details is not None
    assert found["xfs"].uuid in caught.value.details


def test_an_image_that_is_a_file_system_and_has_a_partition_table_is_refused(
    open_images: OpenImages, tmp_path: Path, tree: Path
) -> None:
    """As isohybrid images are: what the partitions hold would never be looked at."""
    part = make_ext4(tmp_path / "part", tree=tree)
    run("debugfs", "-w", "-R", "feature needs_recovery", part)
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 66 * MIB)
    run("sfdisk", "-q", disk, stdin="label: dos\nstart=2048,size=64MiB")
    with disk.open("r+b") as target:
        target.seek(MIB)
        target.write(part.read_bytes())
    (before,) = states(open_images(image_of(disk)))
    assert (before.kind, before.clean) == ("ext4", False)
    with disk.open("r+b") as target:
        target.seek(32 << 10)
        target.write(b"\1CD001\1".ljust(2048, b"\0") + b"\xffCD001\1".ljust(2048, b"\0"))
    (state,) = states(open_images(image_of(disk)))
    assert (state.kind, state.clean) == ("ambivalent", False)
    assert "contradict" in state.observed


def test_vfat_with_its_dirty_flag_set(open_images: OpenImages, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, 300 * MIB)
    run("mkfs.vfat", "-F", "32", path)
    with path.open("r+b") as file:
        file.seek(0x41)
        file.write(b"\1")
    (state,) = states(open_images(image_of(path)))
    assert (state.kind, state.clean, state.observed) == ("vfat", False, "whole disk: dirty flag in the boot sector")


def test_an_empty_disk_has_no_file_system(open_images: OpenImages, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "1T")
    assert states(open_images(image_of(tmp_path / "disk.qcow2"))) == ()


def test_what_lies_under_encryption_is_not_clean(open_images: OpenImages, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    # Magic, version 1 and a UUID of the LUKS1 header (LUKS On-Disk Format Specification 1.2.3, table 1).
    header = bytearray(592)
    header[0:8] = b"LUKS\xba\xbe\0\1"
    header[168:204] = b"a100b50a-2e36-4a82-84af-1e828f83233f"
    path.write_bytes(bytes(header) + bytes(4 * MIB))
    (state,) = states(open_images(image_of(path)))
    assert (state.kind, state.clean) == ("crypto_LUKS", False)
    assert state.observed == "whole disk: LUKS: cannot be read from the host"


def test_inspecting_leaves_nothing_behind(
    export: QemuExport, open_images: OpenImages, tmp_path: Path, tree: Path
) -> None:
    path = make_xfs(tmp_path / "xfs.part", tree=tree, folder=tmp_path / "m")
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 400 * MIB)
    run("sfdisk", "-q", disk, stdin="label: dos\nstart=2048,size=320MiB\n")
    with disk.open("r+b") as target, path.open("rb") as source:
        target.seek(MIB)
        shutil.copyfileobj(source, target)
    (view,) = open_images(image_of(disk))
    before = sorted(view.path.parent.iterdir())
    (state,) = states((view,))
    assert (state.kind, state.clean) == ("xfs", True)
    read((view,), state.uuid, "/random")
    assert sorted(entry for entry in view.path.parent.iterdir() if entry.suffix != ".map") == before
    assert len(mounts_below(view.path.parent)) == 1
