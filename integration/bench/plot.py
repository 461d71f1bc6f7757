"""The picture of the pause benchmark: `python -m integration.bench.plot PAUSE.JSON PICTURE.PNG`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

_COLOURS = {"virsh-live-disk": "#b8b8b8", "live": "#1f77b4", "instant": "#e0912f"}
_NAMES = {"virsh-live-disk": "plain virsh, memory to disk", "live": "vmsnap live", "instant": "vmsnap instant"}
_TITLES = {"idle": "idle", "pgbench": "pgbench", "memory-writer": "rewriting its memory without end"}
_TARGET_MS = 30
_BAR = 0.27
_FLOOR_MS = 5.0


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw the medians as bars, and the longest pause as a line above each."""
    rows = measured["rows"]
    loads = [load for load in _TITLES if any(row["load"] == load for row in rows)]
    sizes = sorted({row["ram_mib"] for row in rows})
    modes = [mode for mode in _COLOURS if any(row["mode"] == mode for row in rows)]
    figure, panels = plt.subplots(1, len(loads), figsize=(3.9 * len(loads), 4.2), sharey=True, squeeze=False)
    for panel, load in zip(panels[0], loads, strict=True):
        for number, mode in enumerate(modes):
            for place, size in enumerate(sizes):
                found = [row for row in rows if (row["load"], row["mode"], row["ram_mib"]) == (load, mode, size)]
                if found:
                    _bar(panel, found[0], x=place + (number - (len(modes) - 1) / 2) * _BAR)
        panel.axhline(_TARGET_MS, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        panel.set_title(f"guest: {_TITLES[load]}", fontsize=10)
        panel.set_xticks(range(len(sizes)), [f"{size / 1024:g} GiB" for size in sizes])
        panel.set_xlim(-0.55, len(sizes) - 0.45)
        panel.tick_params(length=0)
        panel.set_axisbelow(True)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    first = panels[0][0]
    first.set_yscale("log")
    first.set_ylim(_FLOOR_MS, 1.8 * max([_TARGET_MS, *(row["pause_max_ms"] or 0 for row in rows)]))
    ticks = [tick for tick in (5, 10, 30, 100, 300, 1000, 3000, 10000) if tick < first.get_ylim()[1]]
    first.set_yticks(ticks, [f"{tick} ms" if tick < 1000 else f"{tick / 1000:g} s" for tick in ticks], minor=False)
    first.minorticks_off()
    first.set_ylabel("the guest stands still for (logarithmic)")
    handles = [Patch(color=_COLOURS[mode], label=_NAMES[mode]) for mode in modes]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    runs = sorted({row["runs"] for row in rows})
    figure.text(
        0.01,
        0.005,
        f"bars: medians; lines: the longest; runs of each: {runs[0]}"
        + (f" to {runs[-1]}; " if runs[1:] else "; ")
        + f"dashed: {_TARGET_MS} ms",
        fontsize=7,
        color="#666666",
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)


def _bar(panel: Any, row: dict[str, Any], *, x: float) -> None:
    colour = _COLOURS[row["mode"]]
    if row["pause_p50_ms"] is None:
        panel.text(
            x, _FLOOR_MS * 1.15, "never converges", rotation=90, ha="center", va="bottom", fontsize=7.5, color="#666666"
        )
        return
    panel.bar(x, row["pause_p50_ms"] - _FLOOR_MS, bottom=_FLOOR_MS, width=_BAR * 0.92, color=colour, zorder=2)
    panel.vlines(x, row["pause_p50_ms"], row["pause_max_ms"], color="#333333", linewidth=1.1, zorder=3)
    above = row["pause_max_ms"] * 1.06
    panel.text(
        x, above, f"{row['pause_p50_ms']:.0f}", ha="center", va="bottom", fontsize=7.5, color="#222222", zorder=4
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
