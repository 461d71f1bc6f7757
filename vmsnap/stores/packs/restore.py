"""Restore a snapshot from a plain copy of a vmsnap replica, with nothing of vmsnap.

    python3 restore.py PLACE                     list the snapshots
    python3 restore.py PLACE SNAPSHOT FOLDER     write its disks and files into FOLDER, which must not exist

PLACE is a directory with the objects of the replica: one that was the replica, or a copy of the bucket, for example made with
'aws s3 sync' or 'rclone copy'. Of an encrypted replica the key (64 hexadecimal digits, as 'encryption_key' in the credential
of [replica]) is taken from the environment variable VMSNAP_KEY, or from the first line of standard input.

It needs Python 3.9 or newer, the program 'zstd' and, for an encrypted replica, 'openssl' (1.1 or newer). Every block is compared
with its digest, and every disk with the one in the snapshot's manifest. The format is described in packs.md.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# ruff: noqa: T201 - this is a program of its own

BLOCK = 65536
LEAF = 2048
HOLE = bytes(32)
MAP_HEAD = 32
Json = dict[str, "object"]
Places = dict[int, "tuple[bytes, bytes, int, int, int]"]


class DamagedError(Exception):
    """Something is not what its digest says, or is missing."""


class Key:
    """The key of an encrypted replica, and what is derived from it."""

    def __init__(self, key: bytes, *, repository: str) -> None:
        def derived(use: str) -> bytes:
            return hmac.new(key, f"vmsnap packs 1 {use} {repository}".encode(), hashlib.sha256).digest()

        # The AES key is the SHA-256 of this text, as 'openssl enc -md sha256 -nosalt' makes it.
        self._password = derived("data").hex()
        self._id = derived("id")
        self._signature = derived("signature")
        self.check = derived("check").hex()

    def block_id(self, digest: bytes) -> bytes:
        """Return the id of a block with that SHA-256."""
        return hmac.new(self._id, digest, hashlib.sha256).digest()

    def signature(self, text: bytes) -> str:
        """Return what vouches for a text."""
        return hmac.new(self._signature, text, hashlib.sha256).hexdigest()

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        """Return the plain bytes of sealed ones: AES-GCM is counter mode that begins at 2, with a tag.

        The tag is not checked: whatever is decrypted here is compared with a digest or a signature afterwards.
        """
        counters = b"".join(_counters(one[:12], count=-(-(len(one) - 28) // 16)) for one in sealed)
        reader, writer = os.pipe()
        os.write(writer, f"{self._password}\n".encode())
        os.close(writer)
        try:
            stream = _run(
                ["openssl", "enc", "-e", "-aes-256-ecb", "-nopad", "-nosalt", "-md", "sha256", "-pass", f"fd:{reader}"],
                data=counters,
                pass_fds=(reader,),
            )
        finally:
            os.close(reader)
        plain, position = [], 0
        for one in sealed:
            data = one[12:-16]
            mask = stream[position : position + len(data)]
            position += -(-len(data) // 16) * 16
            mixed = int.from_bytes(data, "little") ^ int.from_bytes(mask, "little")
            plain.append(mixed.to_bytes(len(data), "little"))
        return plain


def _counters(nonce: bytes, *, count: int) -> bytes:
    """Return the counter blocks of so many blocks of AES."""
    found = bytearray(16 * count)
    for place in range(12):
        found[place::16] = nonce[place : place + 1] * count
    numbers = b"".join(map(struct.Struct(">I").pack, range(2, 2 + count)))
    for place in range(4):
        found[12 + place :: 16] = numbers[place::4]
    return bytes(found)


def _run(command: list[str], *, data: bytes, pass_fds: tuple[int, ...] = ()) -> bytes:
    try:
        done = subprocess.run(command, input=data, capture_output=True, pass_fds=pass_fds, timeout=3600, check=False)
    except FileNotFoundError:
        sys.exit(f"restore.py: the program {command[0]} is not installed")
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise DamagedError(f"{command[0]} failed: {said}")
    return done.stdout


def _content_size(frame: bytes) -> int:
    """Return the size of a zstd frame's content, from its header (RFC 8878, 3.1.1.1)."""
    if frame[:4] != b"\x28\xb5\x2f\xfd":
        raise DamagedError("a frame is not of zstd; is the key right?")
    flag = frame[4]
    single, kind = flag >> 5 & 1, flag >> 6
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[flag & 3]
    length = (1 if single else 0, 2, 4, 8)[kind]
    if length == 0:
        raise DamagedError("a frame does not say its size")
    size = int.from_bytes(frame[start : start + length], "little")
    return size + 256 if length == 2 else size


class Place:
    """A copy of a replica."""

    def __init__(self, root: Path) -> None:
        self._root = root
        described = json.loads(self.read("vmsnap-packs.json"))
        if described["format_version"] != 1:
            sys.exit(f"restore.py: this is format {described['format_version']}, and this program reads format 1")
        self.repository: str = described["repository"]
        self.key: Key | None = None
        if described["encryption"] != "none":
            text = os.environ.get("VMSNAP_KEY") or sys.stdin.readline()
            try:
                self.key = Key(bytes.fromhex(text.strip()), repository=self.repository)
            except ValueError:
                sys.exit("restore.py: the key is not in hexadecimal")
            if self.key.check != described["key_check"]:
                sys.exit("restore.py: the replica is encrypted, and this is not its key")
        self._moves: dict[bytes, dict[bytes, tuple[bytes, int, int, int]]] = {}

    def read(self, name: str) -> bytes:
        """Read an object."""
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None

    def snapshots(self) -> Iterator[Json]:
        """Yield the bodies of all manifests."""
        for path in sorted((self._root / "snapshots").glob("*/*.json")):
            envelope = json.loads(path.read_bytes())
            if envelope["repository"] != self.repository:
                print(f"{path}: is from another replica", file=sys.stderr)
            elif envelope["kind"] == "snapshot":
                try:
                    yield self._body(envelope)
                except (DamagedError, ValueError) as error:
                    print(f"{path}: is damaged: {error}", file=sys.stderr)

    def _body(self, envelope: Json) -> Json:
        if self.key is None:
            text = json.dumps(envelope["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
            signature = hashlib.sha256(text).hexdigest()
        else:
            text = self.key.decrypt([base64.b64decode(str(envelope["sealed"]))])[0]
            signature = self.key.signature(text)
        if signature != envelope["signature"]:
            raise DamagedError("its signature is not of its body")
        body: Json = json.loads(text)
        return body

    def map(self, digest: bytes, *, tag: bytes, folder: str = "maps") -> bytes:
        """Return the plain content of a map. Moves are named by the pack that they are of, and by no digest of theirs."""
        text = digest.hex()
        name = f"{folder}/{text[:2]}/{text}"
        data = self.read(name)
        if folder == "maps" and hashlib.sha256(data).digest() != digest:
            raise DamagedError(f"{name}: its SHA-256 is not its name")
        if data[8:16] != tag:
            raise DamagedError(f"{name}: it is no map of kind {tag.decode()}")
        stored = data[MAP_HEAD:]
        plain = stored if self.key is None else self.key.decrypt([stored])[0]
        return _run(["zstd", "-d", "-c", "-q"], data=plain)

    def leaf(self, digest: bytes, *, tag: bytes = b"vmsnapL1", folder: str = "maps") -> Places:
        """Return the blocks of a leaf that are no holes: id, pack, offset, length and slot, by number."""
        plain = self.map(digest, tag=tag, folder=folder)
        count, packs = struct.unpack_from("<II", plain)
        ids = 8 + 32 * packs
        columns = struct.unpack_from(f"<{4 * count}I", plain, ids + 32 * count)
        found = {}
        for number in range(count):
            identity = plain[ids + 32 * number : ids + 32 * number + 32]
            if identity != HOLE:
                at = 8 + 32 * columns[number]
                where = columns[count + number], columns[2 * count + number], columns[3 * count + number]
                found[number] = (identity, plain[at : at + 32], *where)
        return found

    def blocks(self, places: Places) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield number, bytes and SHA-256 of blocks, each compared with its id."""
        frames: dict[tuple[bytes, int, int], list[tuple[int, bytes, int]]] = {}
        for number, (identity, pack, offset, length, slot) in places.items():
            where = self._where(identity, pack, offset, length, slot)
            frames.setdefault(where[:3], []).append((number, identity, where[3]))
        ordered = sorted(frames)
        stored = [self._stored(*frame) for frame in ordered]
        plain = stored if self.key is None else self.key.decrypt(stored)
        content = _run(["zstd", "-d", "-c", "-q"], data=b"".join(plain))
        position = 0
        for index, frame in enumerate(ordered):
            end = position + _content_size(plain[index])
            for number, identity, slot in frames[frame]:
                block = content[position + slot * BLOCK : min(position + (slot + 1) * BLOCK, end)]
                digest = hashlib.sha256(block).digest()
                if (digest if self.key is None else self.key.block_id(digest)) != identity:
                    raise DamagedError(
                        f"packs/{frame[0].hex()[:2]}/{frame[0].hex()}: block {identity.hex()} is another"
                    )
                yield number, block, digest
            position = end

    def _where(self, identity: bytes, pack: bytes, offset: int, length: int, slot: int) -> tuple[bytes, int, int, int]:
        while not self._path(pack).exists():
            if pack not in self._moves:
                moved = self.leaf(pack, tag=b"vmsnapV1", folder="moves").values()
                self._moves[pack] = {one[0]: (one[1], one[2], one[3], one[4]) for one in moved}
            if identity not in self._moves[pack]:
                raise DamagedError(f"packs/{pack.hex()[:2]}/{pack.hex()} was rewritten without block {identity.hex()}")
            pack, offset, length, slot = self._moves[pack][identity]
        return pack, offset, length, slot

    def _path(self, pack: bytes) -> Path:
        return self._root / "packs" / pack.hex()[:2] / pack.hex()

    def _stored(self, pack: bytes, offset: int, length: int) -> bytes:
        with self._path(pack).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise DamagedError(f"packs/{pack.hex()[:2]}/{pack.hex()} ends before its time")
        return data

    def write(self, root: str, *, path: Path, digests: Path | None = None) -> str:
        """Write a disk, with holes, and return the SHA-256 of its digests, which are written too where wanted."""
        plain = self.map(bytes.fromhex(root), tag=b"vmsnapR1")
        size, leaf_blocks, count = struct.unpack_from("<QII", plain)
        if leaf_blocks != LEAF:
            raise DamagedError(f"maps/{root[:2]}/{root}: leaves of {leaf_blocks} blocks are not of format 1")
        whole = hashlib.sha256()
        with path.open("xb") as file, digests.open("xb") if digests else contextlib.nullcontext() as table:
            file.truncate(size)
            for number in range(count):
                leaf = plain[16 + 32 * number : 48 + 32 * number]
                first = number * LEAF
                found = bytearray(32 * min(LEAF, -(-size // BLOCK) - first))
                for at, block, digest in self.blocks(self.leaf(leaf)) if leaf != HOLE else ():
                    file.seek((first + at) * BLOCK)
                    file.write(block)
                    found[32 * at : 32 * at + 32] = digest
                whole.update(found)
                if table is not None:
                    table.write(found)
                print(f"\r{path.name}: {100 * (number + 1) // count} %", end="", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        print(file=sys.stderr)
        return whole.hexdigest()


def restore(place: Place, body: Json, *, folder: Path) -> None:
    """Write the disks, files and manifest of a snapshot, which only their owner may read."""
    os.umask(0o077)
    folder.mkdir()
    manifest: dict[str, list[dict[str, str]]] = body["manifest"]  # type: ignore[assignment]
    roots = {disk["target"]: disk["root"] for disk in body["disks"]}  # type: ignore[attr-defined]
    for disk in manifest["disks"]:
        image, digests = folder / Path(disk["image"]).name, folder / Path(disk["digests"]).name
        if place.write(roots[disk["target"]], path=image, digests=digests) != disk["digests_sha256"]:
            raise DamagedError(f"{image} is not what the manifest vouches for")
    for one in body["files"]:  # type: ignore[attr-defined]
        path = folder / Path(one["name"]).name
        place.write(one["root"], path=path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != one["sha256"]:
            raise DamagedError(f"{path} is not what the manifest vouches for")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run the program."""
    if len(arguments) not in {1, 3} or arguments[0].startswith("-"):
        sys.exit(str(__doc__))
    try:
        place = Place(Path(arguments[0]))
        bodies = list(place.snapshots())
        if len(arguments) == 1:
            for body in bodies:
                manifest: Json = body["manifest"]  # type: ignore[assignment]
                captured = manifest["capture"]["captured"]  # type: ignore[index]
                print(f"{manifest['id']}  {captured}  {manifest['guest']}")
            return
        wanted = [body for body in bodies if str(body["manifest"]["id"]).startswith(arguments[1])]  # type: ignore[index]
        if len(wanted) != 1:
            sys.exit(f"restore.py: {len(wanted)} snapshots begin with {arguments[1]!r}")
        restore(place, wanted[0], folder=Path(arguments[2]))
    except DamagedError as error:
        sys.exit(f"restore.py: damaged: {error}")
    except OSError as error:
        sys.exit(f"restore.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
