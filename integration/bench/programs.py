"""Programs of the benchmarks that are written in C."""

from __future__ import annotations

from pathlib import Path

from integration.lab.commands import run


def compiled(source: Path, *, folder: Path) -> Path:
    """Return a program made of one file, in a folder; it needs no libraries where it runs."""
    program = folder / source.stem
    run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o", program, source])
    return program
