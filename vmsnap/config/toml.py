"""Reading one TOML file: its permissions, its text, its syntax."""

from __future__ import annotations

import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsnap.config.keylines import KeyLines, key_lines
from vmsnap.errors import ConfigError

LARGEST_BYTES = 1 << 20
_IN_URL = re.compile(r"(?<=://)[^\s\"']+")
_PLACE = re.compile(r"\s*\(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)\Z")


@dataclass(frozen=True, kw_only=True)
class TomlFile:
    """A file that is valid TOML, and where its keys stand."""

    path: Path
    data: dict[str, Any]
    lines: KeyLines


def read_toml(path: Path, *, remedy_if_missing: str) -> TomlFile:
    """Read a file. Raises ConfigError for one that is missing, unreadable, open to others, or not TOML."""
    raw = _read(path, remedy_if_missing=remedy_if_missing)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})",
            remedy="save the file as UTF-8",
        ) from error
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(error, path=path, text=text) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply", remedy="compare with the examples in policies/") from error
    return TomlFile(path=path, data=data, lines=key_lines(text))


def refuse_if_open(path: Path, *, mode: int) -> None:
    """Raise ConfigError where everybody may write to a file or folder: it says what vmsnap does as root."""
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise ConfigError(
            f"everybody may write to '{path}' (mode {stat.S_IMODE(mode):04o})", remedy=f"run: chmod o-w '{path}'"
        )


def _read(path: Path, *, remedy_if_missing: str) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no plain file"
            raise ConfigError(f"'{path}' is {kind}", remedy="name a TOML file")
        refuse_if_open(path, mode=mode)
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path}'", remedy=remedy_if_missing) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read '{path}': {error.strerror or error}", remedy="run vmsnap as root, or name another --config"
        ) from error
    if len(raw) > LARGEST_BYTES:
        raise ConfigError(f"'{path}' is larger than 1 MiB", remedy="is it the right file?")
    return raw


def _syntax_error(error: tomllib.TOMLDecodeError, *, path: Path, text: str) -> ConfigError:
    said = str(error)
    place = _PLACE.search(said)
    line = column = None
    if place is not None:
        said = said[: place.start()]
        if place["line"]:
            line, column = int(place["line"]), int(place["column"])
        else:
            line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    where = f"{path}:{line}:{column}" if line else str(path)
    lines = text.splitlines()
    quoted = (
        f"{_without_secrets(lines[line - 1])}\n{' ' * (column - 1)}^"
        if line and column and line <= len(lines)
        else None
    )
    return ConfigError(
        f"{where}: not valid TOML: {said[:1].lower()}{said[1:]}",
        details=quoted,
        remedy='a line is KEY = VALUE, texts and durations in quotes: max_pause = "500ms"',
    )


def _without_secrets(line: str) -> str:
    """Return a line with what stands in its URLs blanked: tokens and passwords do."""
    return _IN_URL.sub(lambda found: "*" * len(found[0]), line)
