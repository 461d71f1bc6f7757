"""Decoders meet bytes that nobody encoded: they refuse them by name, and never otherwise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct

from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import VerificationError
from vmsnap.stores.packs.frames import compress, open_frame
from vmsnap.stores.packs.manifests import decode
from vmsnap.stores.packs.maps import LEAF_TAG, ROOT_TAG, decode_leaf, decode_root
from vmsnap.stores.packs.packfile import SKIPPABLE, SKIPPABLE_MAGIC, read_index
from vmsnap.stores.packs.seals import KeyedSeal, OpenSeal

SEALS = (OpenSeal(), KeyedSeal(bytes(32), repository="0" * 32))
small = st.integers(0, 5)
plain_leaf = st.builds(
    lambda count, packs, rest: struct.pack("<II", count, packs) + rest, small, small, st.binary(max_size=400)
)
plain_root = st.builds(
    lambda size, leaf, count, rest: struct.pack("<QII", size, leaf, count) + rest,
    st.integers(0, 1 << 40),
    st.sampled_from([2048, 1]),
    small,
    st.binary(max_size=200),
)


def a_map(plain: bytes, *, tag: bytes) -> bytes:
    return SKIPPABLE.pack(SKIPPABLE_MAGIC, 24) + tag + bytes(16) + compress(plain)


@given(plain=st.one_of(plain_leaf, st.binary(max_size=100)))
def test_a_leaf_that_is_read_can_be_walked(plain: bytes) -> None:
    with contextlib.suppress(VerificationError):
        leaf = decode_leaf(a_map(plain, tag=LEAF_TAG), seal=SEALS[0], name="maps/x")
        assert len(list(leaf.places())) <= len(leaf)


@given(plain=st.one_of(plain_root, st.binary(max_size=100)))
def test_a_root_that_is_read_has_all_leaves(plain: bytes) -> None:
    with contextlib.suppress(VerificationError):
        root = decode_root(a_map(plain, tag=ROOT_TAG), seal=SEALS[0], name="maps/x")
        assert len(root.leaves) == -(-root.size_bytes // (2048 * 65536))


@given(data=st.binary(max_size=300), seal=st.sampled_from(SEALS))
def test_noise_is_refused(data: bytes, seal: OpenSeal | KeyedSeal) -> None:
    for read in (
        lambda: decode_leaf(data, seal=seal, name="x"),
        lambda: decode_root(data, seal=seal, name="x"),
        lambda: open_frame(data, seal=seal, name="x"),
        lambda: read_index(data, size_bytes=len(data), seal=seal, name="x"),
        lambda: decode(data, name="x", version="v", repository="0" * 32, seal=seal),
    ):
        with contextlib.suppress(VerificationError):
            read()


@given(rows=st.lists(st.tuples(small, small), max_size=4), count=small, blocks=small, ids=st.binary(max_size=160))
def test_an_index_that_is_read_fits_its_pack(rows: list[tuple[int, int]], count: int, blocks: int, ids: bytes) -> None:
    stored = struct.pack("<I", count) + b"".join(struct.pack("<II", *row) for row in rows) + ids
    trailer = struct.pack(
        "<16s16sII8s", bytes(16), hashlib.sha256(stored).digest()[:16], len(stored), blocks, b"vmsnapP1"
    )
    frames = bytes(sum(length for length, _ in rows))
    data = frames + SKIPPABLE.pack(SKIPPABLE_MAGIC, len(stored) + 48) + stored + trailer
    with contextlib.suppress(VerificationError):
        index = read_index(data, size_bytes=len(data), seal=SEALS[0], name="packs/x")
        places = list(index.places(bytes(32)))
        assert len(places) == blocks
        assert all(place.offset + place.length <= len(frames) for _, place in places)


@given(document=st.dictionaries(st.sampled_from(["repository", "kind", "upload", "at", "body", "sealed"]), st.text()))
def test_a_manifest_that_is_no_manifest_is_refused(document: dict[str, str]) -> None:
    data = json.dumps({"format_version": 1, **document}).encode()
    with contextlib.suppress(VerificationError):
        decode(data, name="snapshots/db/x.json", version="v", repository="0" * 32, seal=SEALS[1])
