"""Places for clones, wanted by several processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmsnap.errors import BusyError
from vmsnap.model.admission import HostMemory, Place
from vmsnap.model.ids import RunId
from vmsnap.state.admissions import FileAdmissions

_CHILD = """
import sys
from pathlib import Path
from vmsnap.errors import BusyError
from vmsnap.model.admission import HostMemory, Place
from vmsnap.model.ids import RunId
from vmsnap.state.admissions import FileAdmissions
state, run = Path(sys.argv[1]), RunId(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    place = Place(run=run, guest="db" + run, memory_bytes=100)
    with FileAdmissions(state, most=9).admitted(place, look=lambda: HostMemory(available_bytes=150)):
        print("admitted", flush=True)
        sys.stdin.readline()
except BusyError as error:
    print("busy", flush=True)
"""


def child(state: Path, number: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", _CHILD, str(state), f"000000000{number}"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert said(process) == "ready"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_processes_that_begin_together_memory_is_promised_once(tmp_path: Path) -> None:
    processes = [child(tmp_path, number) for number in range(4)]
    try:
        for process in processes:
            go_on(process)
        words = [said(process) for process in processes]
        assert sorted(words) == ["admitted", "busy", "busy", "busy"]
        admissions = FileAdmissions(tmp_path, most=9)
        mine = Place(run=RunId("00000000ff"), guest="mine", memory_bytes=100)
        with pytest.raises(BusyError), admissions.admitted(mine, look=lambda: HostMemory(available_bytes=150)):
            pass
        holder = processes[words.index("admitted")]
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=20)
        with admissions.admitted(mine, look=lambda: HostMemory(available_bytes=150)):
            assert [path.stem for path in (tmp_path / "admissions").glob("*.json")] == [mine.run]
        assert list((tmp_path / "admissions").glob("*.json")) == []
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=20)


def test_a_damaged_place_is_counted(tmp_path: Path) -> None:
    admissions = FileAdmissions(tmp_path, most=2)
    places = [Place(run=RunId(f"000000000{number}"), guest="db", memory_bytes=1) for number in range(3)]

    def plenty() -> HostMemory:
        return HostMemory(available_bytes=1 << 40)

    with admissions.admitted(places[0], look=plenty), admissions.admitted(places[1], look=plenty):
        (tmp_path / "admissions" / f"{places[0].run}.json").write_text("{")
        with pytest.raises(BusyError, match="another guest, db"), admissions.admitted(places[2], look=plenty):
            pass


def test_a_place_says_whose_it_is(tmp_path: Path) -> None:
    place = Place(run=RunId("00000000aa"), guest="db", memory_bytes=42)
    with FileAdmissions(tmp_path, most=1).admitted(place, look=lambda: HostMemory(available_bytes=42)):
        text = (tmp_path / "admissions" / "00000000aa.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"version": 1, "guest": "db", "memory_bytes": 42}
