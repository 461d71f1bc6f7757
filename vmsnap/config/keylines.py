"""Where each key of a TOML text stands, so that an error can name its line.

``tomllib`` does not tell. This walks a text that ``tomllib`` has accepted already, and understands just enough: headers,
keys, and where a value ends. Format: TOML 1.0, https://toml.io/en/v1.0.0.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]

_CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True, kw_only=True)
class KeyLines:
    """Line numbers by key path; positions in an array of tables are numbers, as in the parsed data."""

    lines: dict[KeyPath, int] = field(default_factory=dict)

    def find(self, path: Sequence[str | int]) -> int | None:
        """Return the line of a key, or of the nearest thing around it that has a line of its own."""
        for length in range(len(path), 0, -1):
            line = self.lines.get(tuple(path[:length]))
            if line is not None:
                return line
        return None


def key_lines(text: str) -> KeyLines:
    """Return the lines of all keys and sections of a valid TOML text."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.run()
    return KeyLines(lines=scanner.lines)


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._section: KeyPath = ()
        self._array_sizes: dict[KeyPath, int] = {}
        self.lines: dict[KeyPath, int] = {}

    def run(self) -> None:
        while self._at < len(self._text):
            character = self._text[self._at]
            if character in " \t\n":
                self._step()
            elif character == "#":
                self._skip_comment()
            elif character == "[":
                self._header()
            else:
                self._note(self._section, self._key(end="="))
                self._skip_value("\n")

    def _step(self, count: int = 1) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def _header(self) -> None:
        is_array = self._text.startswith("[[", self._at)
        self._step(2 if is_array else 1)
        names = self._key(end="]")
        path = self._inside_arrays(names if not is_array else names[:-1])
        if is_array:
            whole = (*path, names[-1])
            position = self._array_sizes.get(whole, 0)
            self._array_sizes[whole] = position + 1
            self.lines.setdefault(whole, self._line)
            path = (*whole, position)
        self._note((), path)
        self._section = path
        if is_array:
            self._step()

    def _inside_arrays(self, names: KeyPath) -> KeyPath:
        """Return a header's path with the position of the latest table after each array of tables in it."""
        path: KeyPath = ()
        for name in names:
            path = (*path, name)
            if path in self._array_sizes:
                path = (*path, self._array_sizes[path] - 1)
        return path

    def _note(self, section: KeyPath, names: KeyPath) -> None:
        for length in range(1, len(names) + 1):
            self.lines.setdefault((*section, *names[:length]), self._line)

    def _key(self, *, end: str) -> KeyPath:
        """Read a dotted key up to and with the character ``end``."""
        names: list[str] = []
        word = ""
        while self._at < len(self._text):
            character = self._text[self._at]
            if character in "\"'":
                start = self._at
                self._skip_string()
                word = str(tomllib.loads(f"k = {self._text[start : self._at]}")["k"])
            elif character in (end, "."):
                names.append(word)
                word = ""
                self._step()
                if character == end:
                    break
            else:
                word += character.strip()
                self._step()
        return tuple(names)

    def _skip_value(self, *ends: str) -> None:
        """Go to the end of a value: one of ``ends``, outside strings, brackets and comments."""
        while self._at < len(self._text):
            character = self._text[self._at]
            if character in ends:
                return
            if character in "\"'":
                self._skip_string()
            elif character == "#":
                self._skip_comment()
            elif character in _CLOSING:
                self._step()
                self._skip_value(_CLOSING[character])
                self._step()
            else:
                self._step()

    def _skip_comment(self) -> None:
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end

    def _skip_string(self) -> None:
        quote = self._text[self._at]
        fence = quote * 3 if self._text.startswith(quote * 3, self._at) else quote
        self._step(len(fence))
        while self._at < len(self._text) and not self._text.startswith(fence, self._at):
            self._step(2 if quote == '"' and self._text[self._at] == "\\" else 1)
        self._step(len(fence))
        if len(fence) == 3:
            while self._at < len(self._text) and self._text[self._at] == quote:  # up to two quotes before the fence
                self._step()
