"""Judging file systems from what the real tools print (util-linux 2.38, e2fsprogs 1.47, xfsprogs 6.1, btrfs-progs 6.2)."""

from __future__ import annotations

import pytest

from vmsnap.disks import btrfs, ext, fat, xfs
from vmsnap.disks.probe import AMBIVALENT, Partition, Signature, of_whole_disk, parse_blkid, parse_sfdisk
from vmsnap.disks.verdict import Entry, Verdict, path_parts
from vmsnap.errors import PreconditionError, ToolError

DUMPE2FS = """\
Filesystem volume name:   <none>
Last mounted on:          /
Filesystem UUID:          bf0acd6f-8bda-4921-b344-eba670e25d04
Filesystem magic number:  0xEF53
Filesystem revision #:    1 (dynamic)
Filesystem features:      has_journal ext_attr resize_inode dir_index filetype{flags} extent 64bit metadata_csum
Filesystem flags:         signed_directory_hash 
Default mount options:    user_xattr acl
Filesystem state:         {state}
Errors behavior:          Continue
Filesystem OS type:       Linux
Inode count:              196608
{errors}Journal inode:            8
Journal features:         journal_64bit journal_checksum_v3
"""  # noqa: W291

LOGPRINT = """\
xfs_logprint:
    data device: 0xffffffffffffffff
    log device: 0xffffffffffffffff daddr: 409648 length: 131072

    log tail: {tail} head: {head} state: <{state}>

"""

SUPERBLOCK = """\
magic			_BHRfS_M [match]
fsid			58f603e2-8014-494b-8857-0a00e6e82bcf
generation		6
log_root		{log_root}
log_root_transid (deprecated)	0
log_root_level		0
"""

SFDISK_GPT = """\
{
   "partitiontable": {
      "label": "gpt",
      "id": "747C4B7F-C399-EE4C-A8E7-37B15E29B89E",
      "device": "disk",
      "unit": "sectors",
      "firstlba": 2048,
      "lastlba": 4194270,
      "sectorsize": 512,
      "partitions": [
         {
            "node": "disk1",
            "start": 2048,
            "size": 2048,
            "type": "21686148-6449-6E6F-744E-656564454649",
            "uuid": "3E478415-3D1C-A24C-81F9-6F35672E89AC"
         },{
            "node": "disk2",
            "start": 4096,
            "size": 131072,
            "type": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
            "uuid": "1168628A-956E-F74F-A97C-B97B3E8B8E3C"
         }
      ]
   }
}
"""

SFDISK_DOS = """\
{
   "partitiontable": {
      "label": "dos",
      "id": "0x3e0b0c1b",
      "device": "disk",
      "unit": "sectors",
      "sectorsize": 512,
      "partitions": [
         {
            "node": "disk1",
            "start": 2048,
            "size": 20480,
            "type": "83"
         },{
            "node": "disk2",
            "start": 22528,
            "size": 40960,
            "type": "5"
         },{
            "node": "disk5",
            "start": 24576,
            "size": 10240,
            "type": "83"
         }
      ]
   }
}
"""

DEBUGFS_LS = b"""\
/2/040755/0/0/.//
/2/040755/0/0/..//
/11/040700/0/0/lost+found//
/12/100644/0/0/big/921600/
/13/040755/0/0/dir with "q" \xc3\xa9//
/0/000000/0/0//
/17/120777/0/0/lnk/3/

"""

XFS_DB_LS = b"""\
8          128                directory      0x0000002e   1 . (good)
10         128                directory      0x0000172e   2 .. (good)
12         131                regular        0x0018b4e7   3 big (good)
14         132                directory      0xafbcfc59  15 dir with "q" \xc3\xa9 (good)
21         134                symlink        0x001b376b   3 lnk (good)
"""


def dumpe2fs(*, state: str = "clean", flags: str = "", errors: str = "") -> Verdict:
    return ext.parse_header(DUMPE2FS.format(state=state, flags=flags, errors=errors))


def test_ext4_is_clean_only_where_nothing_speaks_against_it() -> None:
    assert dumpe2fs() == Verdict(clean=True, observed="state clean, 0 errors")


@pytest.mark.parametrize(
    ("verdict", "observed"),
    [
        (dumpe2fs(state="not clean"), "state not clean, 0 errors"),
        (dumpe2fs(state="clean with errors"), "state clean with errors, 0 errors"),
        (dumpe2fs(flags=" needs_recovery"), "state clean, needs_recovery, 0 errors"),
        (dumpe2fs(flags=" orphan_present"), "state clean, orphan_present, 0 errors"),
        (dumpe2fs(errors="FS Error count:           3\n"), "state clean, 3 errors"),
        (ext.parse_header(""), "state not given, 0 errors"),
        (ext.parse_header("Filesystem state:         clean\n"), "state clean, 0 errors"),
    ],
)
def test_ext4_that_is_not_clean(verdict: Verdict, observed: str) -> None:
    assert verdict == Verdict(clean=False, observed=observed)


@pytest.mark.parametrize(
    ("text", "clean", "observed"),
    [
        (LOGPRINT.format(tail=30, head=30, state="CLEAN"), True, "log CLEAN"),
        (LOGPRINT.format(tail=19, head=24, state="DIRTY"), False, "log DIRTY"),
        ("xfs_logprint: failed to find head and tail, error: 22", False, "log state not found"),
    ],
)
def test_xfs(text: str, clean: bool, observed: str) -> None:  # noqa: FBT001
    assert xfs.parse_logprint(text) == Verdict(clean=clean, observed=observed)


@pytest.mark.parametrize(
    ("text", "clean", "observed"),
    [
        (SUPERBLOCK.format(log_root=0), True, "log_root 0"),
        (SUPERBLOCK.format(log_root=30408704), False, "log_root 30408704"),
        ("", False, "log_root not found"),
    ],
)
def test_btrfs(text: str, clean: bool, observed: str) -> None:  # noqa: FBT001
    assert btrfs.parse_super(text) == Verdict(clean=clean, observed=observed)


@pytest.mark.parametrize(
    ("state_byte", "entry", "fat32", "observed"),
    [
        (0, 0x0FFFFFFF, True, "no dirty flag"),
        (1, 0x0FFFFFFF, True, "dirty flag in the boot sector"),
        (0, 0x07FFFFFF, True, "dirty flag in the FAT"),
        (1, 0x07FFFFFF, True, "dirty flag in the boot sector, dirty flag in the FAT"),
        (0, 0xFFFF, False, "no dirty flag"),
        (0, 0x7FFF, False, "dirty flag in the FAT"),
        (0, None, False, "no dirty flag"),
        (1, None, False, "dirty flag in the boot sector"),
    ],
)
def test_fat(state_byte: int, entry: int | None, fat32: bool, observed: str) -> None:  # noqa: FBT001
    boot_sector = bytearray(512)
    boot_sector[0x41 if fat32 else 0x25] = state_byte
    expected = Verdict(clean=observed == "no dirty flag", observed=observed)
    assert fat.judge(bytes(boot_sector), second_entry=entry, fat32=fat32) == expected


def test_blkid() -> None:
    assert parse_blkid("DEVNAME=disk\nUUID=85e6a2a3\nTYPE=ext4\n") == Signature(kind="ext4", uuid="85e6a2a3")
    assert parse_blkid("DEVNAME=disk\nPTTYPE=gpt\n") == Signature(table="gpt")
    assert parse_blkid("") == Signature()


def test_a_disk_with_a_file_system_and_a_partition_table_is_ambivalent() -> None:
    both = parse_blkid("DEVNAME=disk\nUUID=2026-01-01-00-00-00-00\nTYPE=iso9660\nPTTYPE=dos\n")
    assert of_whole_disk(both) == Signature(kind=AMBIVALENT)
    for one in (Signature(kind="ext4", uuid="85e6a2a3"), Signature(table="gpt"), Signature()):
        assert of_whole_disk(one) == one


def test_partitions_that_may_hold_a_file_system() -> None:
    assert parse_sfdisk(SFDISK_GPT) == (Partition(name="partition 2", offset=2097152, length=67108864),)
    assert parse_sfdisk(SFDISK_DOS) == (
        Partition(name="partition 1", offset=1048576, length=10485760),
        Partition(name="partition 5", offset=12582912, length=5242880),
    )


def test_a_table_without_partitions() -> None:
    assert parse_sfdisk('{"partitiontable": {"label": "dos", "sectorsize": 512}}') == ()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"partitiontable": {"partitions": [{"start": 1}]}}'])
def test_a_table_that_makes_no_sense(text: str) -> None:
    with pytest.raises(ToolError):
        parse_sfdisk(text)


def test_folders_of_ext4() -> None:
    assert ext.parse_listing(DEBUGFS_LS) == (
        Entry(name=b".", inode=2, kind="folder"),
        Entry(name=b"..", inode=2, kind="folder"),
        Entry(name=b"lost+found", inode=11, kind="folder"),
        Entry(name=b"big", inode=12, kind="file"),
        Entry(name='dir with "q" é'.encode(), inode=13, kind="folder"),
        Entry(name=b"lnk", inode=17, kind="other"),
    )
    with pytest.raises(ToolError):
        ext.parse_listing(b"second line of a name\n")


def test_folders_of_xfs() -> None:
    assert xfs.parse_listing(XFS_DB_LS) == (
        Entry(name=b".", inode=128, kind="folder"),
        Entry(name=b"..", inode=128, kind="folder"),
        Entry(name=b"big", inode=131, kind="file"),
        Entry(name='dir with "q" é'.encode(), inode=132, kind="folder"),
        Entry(name=b"lnk", inode=134, kind="other"),
    )
    with pytest.raises(ToolError):
        xfs.parse_listing(b"21 134 regular 0x001b376b   9 lnk (good)\n")


def test_extents_of_xfs() -> None:
    text = (
        "data offset 0 startblock 24 (0/24) count 225 flag 0\ndata offset 300 startblock 32768 (1/0) count 1 flag 1\n"
    )
    assert xfs.parse_extents(text) == (
        xfs.FileExtent(offset=0, group=0, block=24, count=225, written=True),
        xfs.FileExtent(offset=300, group=1, block=0, count=1, written=False),
    )


@pytest.mark.parametrize(
    ("path", "parts"),
    [("/", ()), ("/a", (b"a",)), ("/a//b/./c/", (b"a", b"b", b"c")), ('/x "y"/é', (b'x "y"', "é".encode()))],
)
def test_paths(path: str, parts: tuple[bytes, ...]) -> None:
    assert path_parts(path) == parts


@pytest.mark.parametrize("path", ["", "a", "a/b", "/a/../b", "/..", "/a\nb", "/a\0", "/a\r"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        path_parts(path)
    assert caught.value.remedy
