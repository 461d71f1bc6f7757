"""A graph of transactions per second for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.text import Text

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 6
_WIDTH = 96


def columns(values: Sequence[float], *, width: int = _WIDTH) -> list[float]:
    """The values averaged into at most `width` columns."""
    if len(values) <= width:
        return list(values)
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    return [sum(values[a:b]) / max(1, b - a) for a, b in itertools.pairwise(edges)]


def draw(values: Sequence[float], *, spans: Sequence[tuple[int, int]], seconds: float) -> Text:
    """A bar a column; columns inside one of `spans` (indexes into values) are coloured: a backup ran then."""
    bars = columns(values)
    scale = len(bars) / max(1, len(values))
    marked = {column for begin, end in spans for column in range(int(begin * scale), int(end * scale) + 1)}
    top = max([*bars, 1.0])
    text = Text()
    for row in range(_HEIGHT, 0, -1):
        text.append(f"{top * row / _HEIGHT:6.0f} " if row in (_HEIGHT, 1) else " " * 7, style="dim")
        for index, bar in enumerate(bars):
            filled = bar / top * _HEIGHT - (row - 1)
            block = _BLOCKS[max(0, min(8, round(filled * 8)))]
            text.append(block, style="yellow" if index in marked else "green")
        text.append("\n")
    text.append(f"{'TPS':>6} {'0 s':<{max(4, len(bars) - 6)}}{seconds:.0f} s\n", style="dim")
    return text
