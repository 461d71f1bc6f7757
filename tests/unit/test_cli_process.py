"""The program as a process: exit codes, streams, signals, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli_samples import BEHAVIOUR, sample_environment, write_config
from vmsnap.state.environments import FileEnvironmentBook

ROOT = Path(__file__).parents[2]


def run(
    *arguments: str, behaviour: str = "", module: str = "tests.unit.cli_samples", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, BEHAVIOUR: behaviour, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path))


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("", 0),
        ("safety", 5),
        ("bug", 70),
    ],
)
def test_exit_codes_of_the_real_process(config: str, behaviour: str, code: int) -> None:
    done = run("backup", "db1", "--json", "--config", config, behaviour=behaviour)
    assert done.returncode == code
    assert json.loads(done.stdout)
    assert done.stderr == ""


def test_the_real_program_checks_policies(config: str) -> None:
    done = run("policy", "check", module="vmsnap", VMSNAP_CONFIG=config)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok      db1.toml: guest 'db1'\n", "")
    (Path(config).parent / "policies" / "bad.toml").write_text("x = 1")
    assert run("policy", "check", "--config", config, module="vmsnap").returncode == 2


def test_help_loads_no_driver_and_no_validation() -> None:
    done = run("--help", module="vmsnap", PYTHONPROFILEIMPORTTIME="1")
    loaded = set(re.findall(r"\|\s+([a-z_0-9.]+)$", done.stderr, flags=re.MULTILINE))
    assert "typer" in loaded
    for heavy in ("libvirt", "paramiko", "pyroute2", "pydantic", "vmsnap.bootstrap"):
        assert heavy not in loaded


def hear_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would a child of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_and_clean_up_still_runs(config: str, number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.cli_samples", "backup", "db1", "--config", config],
        cwd=ROOT,
        env={**os.environ, BEHAVIOUR: "slow"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509 - no threads here
    )
    assert child.stderr is not None
    while child.stderr.readline() != "ready\n":
        pass
    child.send_signal(number)
    stdout, rest = child.communicate(timeout=30)
    assert child.returncode == 6
    assert stdout == ""
    assert "vmsnap: stopping: what was made is being undone\n" in rest
    assert "cleaned up\n" in rest  # though a second signal arrived in the middle of it
    assert f"stopped by {number.name}" in rest
    assert rest.count("stopping") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_forward_in_order(config: str, number: signal.Signals) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.unit.cli_samples",
            "env",
            "forward",
            "db1-test",
            "22",
            "--json",
            "--config",
            config,
        ],
        cwd=ROOT,
        env={**os.environ, BEHAVIOUR: "slow"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509 - no threads here
    )
    assert child.stdout is not None
    document = ""
    while not document.endswith("}\n"):  # it is there while the program goes on
        document += child.stdout.readline()
    assert json.loads(document)["listen_port"] == 40001
    child.send_signal(number)
    assert child.communicate(timeout=30) == ("", "")
    assert child.returncode == 0


def test_a_reader_that_went_away_is_no_error(config: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.cli_samples", "show", "3fa9", "--config", config],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(timeout=30) == 0
    child.stderr.close()


def test_names_beyond_the_terminals_alphabet_are_escaped_not_fatal(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "policies" / "datenbänk.toml").write_text("")
    done = run("policy", "check", "--config", str(config), PYTHONIOENCODING="ascii", module="vmsnap")
    assert done.returncode == 0
    assert "datenb\\xe4nk" in done.stdout


def on_terminal(*arguments: str, behaviour: str = "", **variables: str) -> tuple[int, str]:
    """Run the program with a terminal as its stdout and stderr; return its exit code and all that it drew."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.cli_samples", *arguments],
        cwd=ROOT,
        env={**os.environ, BEHAVIOUR: behaviour, "TERM": "xterm-256color", "COLUMNS": "100", **variables},
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    drawn = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    os.close(parent)
    return process.wait(timeout=30), drawn.decode()


def stripped(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_each_step_done_and_the_names_guests_gave_cannot_draw(config: str) -> None:
    code, drawn = on_terminal("backup", "db1", "--config", config)
    assert code == 0
    text = stripped(drawn)
    assert re.search(r"✓ check +0\.\d s", text)
    assert re.search(r"✓ capture +0\.\d s +512 B", text)
    assert re.search(r"✓ drain ", text)
    assert "rung \\x1b[31mlink-flap\\x07 failed" in text
    assert "\x07" not in drawn
    assert "Snapshot 3fa9b0c1d2 of db1 is stored" in text


def test_a_terminal_marks_the_step_that_failed(config: str) -> None:
    code, drawn = on_terminal("backup", "db1", "--config", config, behaviour="safety")
    assert code == 5
    text = stripped(drawn)
    assert re.search(r"✗ capture ", text)
    assert "Error: not clean\r\n  state: in production\r\n  line two\r\nWhat to do: look at the log" in text


# Shell completion.


def complete(line: str, *, config: str) -> list[str]:
    done = run(
        module="tests.unit.cli_samples",
        _VMSNAP_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(line.count(" ")),
        VMSNAP_CONFIG=config,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_knows_guests_snapshots_and_environments(config: str) -> None:
    (Path(config).parent / "policies" / "db2.toml").write_text("broken = ")
    FileEnvironmentBook(Path(config).parent / "state").add(sample_environment().environment)
    assert complete("vmsnap backup d", config=config) == ["db1", "db2"]
    assert complete("vmsnap provision ", config=config) == ["3fa9b0c1d2", "db1", "db1@latest", "db2"]
    assert complete("vmsnap env destroy ", config=config) == ["db1-test"]


def test_completion_is_silent_where_anything_is_wrong() -> None:
    assert complete("vmsnap provision ", config="/nowhere/vmsnap.toml") == []


def test_a_narrow_terminal_leaves_columns_out_and_says_so(config: str) -> None:
    _, narrow = on_terminal("list", "--config", config, COLUMNS="80")
    text = stripped(narrow)
    assert "ENGINE" not in text.splitlines()[1]
    assert "Not shown for want of room: CLEAN, ENGINE" in text
    assert "3fa9b0c1d2  2026-11-21 02:00Z" in text


def test_a_log_line_that_nobody_reads_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = (
        "import logging\n"
        "from vmsnap.cli.context import Session\n"
        "Session().set_logging(verbose=True, debug=False)\n"
        "for _ in range(3): logging.getLogger('vmsnap').warning('undoing')\n"
        "print('went on')\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout) == (0, b"went on\n")
