"""Names that vmsnap makes: run ids, and file and link names derived from them.

A snapshot carries the id of the run that made it, so one id finds the journal, the tags and the snapshot.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from functools import lru_cache
from typing import NewType

RunId = NewType("RunId", str)
SnapshotId = NewType("SnapshotId", str)

ID_LENGTH = 10
ID_PATTERN = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}\Z")
_PLAIN = re.compile(r"[A-Za-z0-9_-]")
_LONGEST_FOLDER_NAME = 200


def new_run_id() -> RunId:
    """Return a fresh id of ten hexadecimal digits: short enough for a Linux link name (15 bytes) with a suffix."""
    return RunId(secrets.token_hex(ID_LENGTH // 2))


def is_run_id(text: str) -> bool:
    """Tell whether ``text`` has the form of a run id."""
    return ID_PATTERN.match(text) is not None


@lru_cache(maxsize=4096)
def folder_name(guest: str) -> str:
    """Return a file name for a guest's name, the same every time and different for different guests.

    Letters, digits, ``_`` and ``-`` stand for themselves, and so does a dot that is not the first character.
    Every other byte of the UTF-8 form becomes ``%XX``, so a name with a slash, a quote or ``..`` cannot leave its
    folder. A name too long for a file system is cut and gets a digest.
    """
    parts = []
    for position, character in enumerate(guest):
        if _PLAIN.match(character) or (character == "." and position > 0):
            parts.append(character)
        else:
            parts.extend(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
    name = "".join(parts)
    if len(name) <= _LONGEST_FOLDER_NAME:
        return name or "%"
    digest = hashlib.sha256(guest.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{name[: _LONGEST_FOLDER_NAME - 20]}%{digest}"
