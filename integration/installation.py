"""One installation of vmsnap in the lab, used as an operator uses it: configuration files and the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.lab.guest import LabGuest
from integration.lab.lab import Lab

RUN_LIMIT_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """What one command came to."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.stdout)

    def explain(self) -> str:
        return f"{' '.join(self.argv)}: exit code {self.exit_code}\n{self.stdout}\n{self.stderr}"


class Installation:
    """Settings, policies, state and store in folders of their own."""

    def __init__(self, lab: Lab, *, name: str, store: Path) -> None:
        self.lab = lab
        self.store = store
        self.folder = lab.scratch / f"vmsnap-{name}"
        self.state = self.folder / "state"
        self.runtime = Path("/run") / f"vmsnap-{name}"
        self.config = self.folder / "vmsnap.toml"
        (self.folder / "policies").mkdir(parents=True)
        self.write_config()

    def write_config(self, *, extra: str = "") -> None:
        self.config.write_text(
            f'[store]\npath = "{self.store}"\n{extra}\n[state]\npath = "{self.state}"\n'
            f'[runtime]\npath = "{self.runtime}"\n',
            encoding="utf-8",
        )

    def policy(self, guest: str, text: str = "") -> None:
        """Write the policy of a guest; limits are scaled to the speed of the lab."""
        (self.folder / "policies" / f"{guest}.toml").write_text(text or default_policy(self.lab), encoding="utf-8")

    def argv(self, *arguments: str) -> list[str]:
        program = Path(sys.executable).with_name("vmsnap")
        return [str(program), *arguments, "--config", str(self.config)]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command; its progress lines come on stderr or stdout, which are one stream here."""
        return subprocess.Popen(
            self.argv(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )

    @contextmanager
    def going_on(self, *arguments: str, timeout_s: float = RUN_LIMIT_S) -> Iterator[Any]:
        """Start a command that says with --json that it is ready, and goes on; give its document. End it as Ctrl-C does."""
        process = subprocess.Popen(
            self.argv(*arguments, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        watchdog = threading.Timer(timeout_s * max(1.0, self.lab.time_factor), process.kill)
        watchdog.start()
        try:
            said = ""
            while process.stdout is not None and not said.endswith("\n}\n") and (line := process.stdout.readline()):
                said += line
            assert said.endswith("\n}\n") and "error" not in json.loads(said), said  # noqa: PT018 - one cause
            yield json.loads(said)
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=30 * max(1.0, self.lab.time_factor))
            watchdog.cancel()
        assert (process.returncode, rest) == (0, ("", "")), (process.returncode, rest)

    def run(self, *arguments: str, timeout_s: float = RUN_LIMIT_S) -> Outcome:
        """Run a command to its end, whatever its exit code."""
        argv = self.argv(*arguments)
        limit = timeout_s * max(1.0, self.lab.time_factor)
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=limit, check=False)
        return Outcome(argv=tuple(arguments), exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)

    def ok(self, *arguments: str) -> Any:
        """Run a command with --json, which must succeed; returns its document."""
        outcome = self.run(*arguments, "--json")
        assert outcome.exit_code == 0, outcome.explain()
        return outcome.document


def default_policy(lab: Lab, *, extra: str = "") -> str:
    """A policy whose time limits suit the lab: software emulation is many times slower than a real host."""
    factor = max(1.0, lab.time_factor)
    return (
        f'[capture]\nallow_emulation = true\nmax_pause = "{round(500 * factor)}ms"\n'
        f'[clone]\nboot_deadline = "{round(10 * factor)}s"\nshutdown_deadline = "{round(60 * factor)}s"\n'
        f'[control]\ncommand_timeout = "{round(20 * factor)}s"\n'
        f'[database]\ndrain_deadline = "{round(5 * factor)}s"\nstop_deadline = "{round(60 * factor)}s"\n{extra}'
    )


class RunningVm(LabGuest):
    """A VM that something else defined, seen with the lab's own eyes (its guest agent), not with vmsnap's."""

    def __init__(self, guest: LabGuest, *, name: str) -> None:
        self.lab = guest.lab
        self.spec = guest.spec
        self._connection = None
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def domain(self) -> Any:
        return self.connection.lookupByName(self._name)

    def console(self) -> str:
        return "(an environment has no console log)"
