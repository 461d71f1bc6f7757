"""`make bench NAME=backup`: runs one benchmark of this package inside the lab."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from integration.lab.lab import Lab

NAMES = ("backup",)


def main(name: str) -> int:
    if name not in NAMES:
        print(f"there is no benchmark {name!r}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    console = Console()
    measured: dict[str, object] = importlib.import_module(f"integration.bench.{name}").measure(Lab.current(), console)
    table = Table(title=f"bench {name}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in measured.items():
        table.add_row(key, str(value))
    console.print(table)
    path = Path("build/bench") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "backup"))
