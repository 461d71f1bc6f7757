"""`python -m integration.lab run -- COMMAND...`, `shell`, `build`, `sweep`."""

from __future__ import annotations

import argparse
import os
import sys

from integration.lab.commands import LabError
from integration.lab.host import run_in_lab, sweep
from integration.lab.image import get_image


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.lab", description="vmsnap's laboratory; see README.md")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run", help="run a command in a new lab").add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("shell", help="a shell in a new lab")
    verbs.add_parser("build", help="build the guest image now, and print its folder")
    verbs.add_parser("sweep", help="remove what killed labs left")
    chosen = parser.parse_args()
    try:
        if chosen.verb == "run":
            command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
            if not command:
                parser.error("run needs a command: run -- COMMAND...")
            return run_in_lab(command)
        if chosen.verb == "shell":
            return run_in_lab([os.environ.get("SHELL", "/bin/sh")])
        if chosen.verb == "build":
            print(get_image().folder)
        else:
            sweep()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
