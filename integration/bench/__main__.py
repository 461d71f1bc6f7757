"""`make bench NAME=backup`: runs one benchmark of this package inside the lab."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from integration.lab.lab import Lab

NAMES = ("backup", "pause", "scale", "store")
FOLDER = Path("build/bench")


def main(name: str) -> int:
    if name not in NAMES:
        print(f"there is no benchmark {name!r}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    console = Console()
    module = importlib.import_module(f"integration.bench.{name}")
    measured: dict[str, object] = module.measure(Lab.current(), console)
    _show(name, measured, shown=getattr(module, "SHOWN", ()), console=console)
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return 0


def _show(name: str, measured: dict[str, object], *, shown: tuple[str, ...], console: Console) -> None:
    """Print plain figures as one table, and each list of rows as a table of its own, of the columns in `shown` alone."""
    plain = {key: value for key, value in measured.items() if not _is_rows(value)}
    console.print(_table(f"bench {name}", [{"figure": key, "value": value} for key, value in plain.items()]))
    for key, value in measured.items():
        if _is_rows(value):
            assert isinstance(value, Sequence)
            console.print(_table(key, value if key != "rows" else [{k: row[k] for k in shown or row} for row in value]))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _table(title: str, rows: Sequence[dict[str, object]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column in ("figure", "what", "mode", "load") else "right")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "backup"))
