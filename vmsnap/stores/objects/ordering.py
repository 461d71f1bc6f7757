"""Listings of servers that are file systems inside, put into the order of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmsnap.ports.objects import ObjectInfo


def in_order(found: Iterable[ObjectInfo], *, prefix: str) -> Iterator[ObjectInfo]:
    """Yield objects in the order of their names, from a listing in that order or in that of a walk through folders.

    S3 orders names by their bytes. SeaweedFS and others walk through folders: what is in ``a/`` comes before ``a-b`` there,
    and behind it in S3, because the characters ``-`` and ``.`` come before the slash. Only those two do, of those that names
    may have, so no more has to be held back than what begins alike up to one of the three.
    """
    held: list[ObjectInfo] = []
    stem = ""
    for one in found:
        top = one.name.removeprefix(prefix).split("/", maxsplit=1)[0]
        if held and top != stem and not top.startswith((f"{stem}-", f"{stem}.")):
            yield from _flushed(held)
        if not held:
            stem = top
        held.append(one)
    yield from _flushed(held)


def _flushed(held: list[ObjectInfo]) -> Iterator[ObjectInfo]:
    yield from sorted(held, key=lambda one: one.name)
    held.clear()
