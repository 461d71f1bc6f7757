"""Tables and lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmsnap.cli.text import columns, milliseconds, printable, printable_lines, seconds, size

_RIGHT = frozenset({"SIZE", "NEW", "PAUSE", "OVERLAY", "TOOK"})
# On a narrow terminal these columns are folded; the others are read or copied whole.
_FOLDS = frozenset({"GUEST", "ENGINE", "VERIFIED", "PINNED", "WHY", "ENVIRONMENT", "NETWORK", "WHAT", "DETAIL"})


def print_lines(console: Console, lines: Sequence[str | Text]) -> None:
    """Print lines as they are; on a terminal they wrap."""
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)


def print_table(
    console: Console, *, header: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()
) -> None:
    """Print a table: drawn on a terminal, aligned columns elsewhere.

    ``spare`` are columns to leave out, in this order, on a terminal too narrow for all; a line says so then.
    """
    safe = [[printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        print_lines(console, columns(header, safe))
        return
    left_out: list[str] = []
    while len(left_out) < len(spare) and _width(header, safe, without=left_out) > console.width:
        left_out.append(spare[len(left_out)])
    console.print(_drawn(header, safe, without=left_out))
    if left_out:
        console.print(Text(f"Not shown for want of room: {', '.join(left_out)}. --json has everything.", style="dim"))


def _width(header: Sequence[str], rows: Sequence[Sequence[str]], *, without: Sequence[str]) -> int:
    shown = [index for index, name in enumerate(header) if name not in without]
    return sum(max(len(row[index]) for row in (header, *rows)) + 2 for index in shown) - 2


def _drawn(header: Sequence[str], rows: Sequence[Sequence[str]], *, without: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    shown = [index for index, name in enumerate(header) if name not in without]
    for index in shown:
        name = header[index]
        justify: Literal["left", "right"] = "right" if name in _RIGHT else "left"
        table.add_column(name, justify=justify, no_wrap=name not in _FOLDS, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))
    return table


def print_tree(console: Console, document: Mapping[str, Any]) -> None:
    """Print a nested document whole: a key a line, lists with a dash, long texts as blocks."""
    print_lines(console, _tree(document, indent=0))


def _tree(value: Mapping[str, Any], *, indent: int) -> list[str]:
    lines: list[str] = []
    blank = " " * indent
    for key, item in value.items():
        name = key.replace("_", " ")
        if isinstance(item, Mapping):
            lines += [f"{blank}{name}:", *_tree(item, indent=indent + 2)]
        elif isinstance(item, list) and item:
            lines.append(f"{blank}{name}:")
            for entry in item:
                lines += _entry(entry, indent=indent + 2)
        elif isinstance(item, str) and "\n" in item:
            lines += [f"{blank}{name}:", *(f"{blank}  {line}" for line in printable_lines(item))]
        else:
            lines.append(f"{blank}{name}: {_scalar(key, item)}")
    return lines


def _entry(entry: object, *, indent: int) -> list[str]:
    blank = " " * indent
    if isinstance(entry, Mapping):
        lines = _tree(entry, indent=indent + 2)
        return [f"{blank}- {lines[0].lstrip()}", *lines[1:]] if lines else []
    return [f"{blank}- {_scalar('', entry)}"]


def _scalar(key: str, value: object) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if key.endswith("_bytes"):
            return f"{size(int(value))} ({int(value)} bytes)" if value >= 1024 else f"{int(value)} bytes"
        if key.endswith("_ms"):
            return milliseconds(float(value))
        if key.endswith("seconds"):
            return seconds(float(value))
    return printable(str(value))
