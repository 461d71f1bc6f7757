from __future__ import annotations

import io
import json
import re
import tomllib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from tests.unit.cli_samples import (
    AT,
    NOW,
    UNKNOWN_RUNS,
    FakeApplication,
    booted,
    sample,
    sample_environment,
    session_over,
    write_config,
)
from vmsnap.cli.calendar import calendar_lines
from vmsnap.cli.main import app
from vmsnap.errors import BusyError, ConfigError, NotCleanError, StoreUnreachableError, ToolError
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.due import DueEntry, PruneFailure
from vmsnap.model.due import Outcome as Result
from vmsnap.model.environment import Expiry
from vmsnap.model.forecast import every_so_often, forecast
from vmsnap.model.forgetting import ForgetWishes
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Marks, Pin, Verification
from vmsnap.model.policy import Policy
from vmsnap.model.report import Adoption, ForwardOptions, RestoreOptions, ServeOptions, VerifyReport
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule import Due
from vmsnap.model.selection import Candidate
from vmsnap.model.verification import VerifyChoice, VerifyEntry, damage
from vmsnap.ports.upkeep import CollectWishes
from vmsnap.state.journal import FileJournals

WARNED = (
    Finding(check="store", severity=Severity.OK, message="XFS with reflinks", remedy="nothing"),
    Finding(check="agent", severity=Severity.WARNING, message="does not answer", remedy="install qemu-guest-agent"),
)
REFUSED = (*WARNED, Finding(check="disk vdb", severity=Severity.REFUSAL, message="is passed through", remedy="use LVM"))


@dataclass
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class Program:
    """The program over a fake application, in this process, with nothing that is a terminal."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.application = FakeApplication()

    def __call__(self, *arguments: str, config: bool = True) -> Outcome:
        before = ["--config", str(self.config)] if config else []
        result = CliRunner().invoke(app, [*before, *arguments], obj=session_over(self.application))
        for text in (result.stdout, result.stderr):
            assert not [character for character in text if character < " " and character != "\n"]
        return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(write_config(tmp_path))


def test_backup_prints_what_happened(program: Program) -> None:
    outcome = program("backup", "db1")
    assert outcome.code == 0
    assert outcome.stdout == (
        "Snapshot 3fa9b0c1d2 of db1 is stored and proven clean.\n"
        "  captured  2026-11-21 02:00:03Z; the guest stood still for 23 ms, 1.0 GiB of memory\n"
        "  mode      live: the policy says so\n"
        "  paused    last pass and devices 11.2 ms, resume 12.2 ms\n"
        "  isolated  2 proofs, way to an address: none\n"
        "  drained   9 in flight: 8 finished, 1 rolled back\n"
        "  clean     postgresql: 2 database instances, 1 file system (read: disk)\n"
        "  read      40.0 MiB of disk vda, only what changed since 0123456789\n"
        "  read      1.0 GiB of disk vdb, all: the guest\\nwas off\n"
        "  stored    300 MiB new of 8.0 GiB in 4.2 s\n"
        "  took      1 min 34 s\n"
        "  warning   one cluster\\nhas a standby\n"
    )


def test_backup_says_each_step_in_a_plain_line(program: Program) -> None:
    lines = program("backup", "db1").stderr.splitlines()
    assert [line.split("s] ", 1)[1] for line in lines] == [
        "check",
        "capture",
        "  rung \\x1b[31mlink-flap\\x07 failed",
        "drain",
        "  waiting for 3 transactions, at most 1 min 00 s",
        "done",
    ]


def test_backup_in_json_has_the_promised_keys_and_silence_on_stderr(program: Program) -> None:
    outcome = program("backup", "db1", "--json")
    document = outcome.json
    assert outcome.stderr == ""
    assert set(document) >= {
        "snapshot", "guest", "started", "finished", "capture", "isolation", "drain", "clean", "store", "steps"
    }  # fmt: skip
    assert {"mode": "live", "pause_ms": 23.4, "ram_bytes": 1 << 30}.items() <= document["capture"].items()
    assert document["started"] == "2026-11-21T02:00:03Z"
    assert {"rung": "none", "address": None, "seconds": 0.412}.items() <= document["isolation"].items()
    assert document["isolation"]["proof"][0] == {
        "kind": "topology",
        "name": "bridge members",
        "observed": "vs3fa9b0c1d2t0",
    }
    assert {
        "engine": "postgresql", "in_flight_at_start": 9, "finished": 8, "rolled_back": 1, "seconds": 6.75
    }.items() <= document["drain"].items()  # fmt: skip
    assert [item["instance"] for item in document["drain"]["instances"]] == ["15/main", "15/two"]
    assert document["clean"]["engine"] == "postgresql"
    assert document["clean"]["evidence"]["instances"][0]["observed"] == {"Database cluster state": "shut down"}
    assert document["store"] == {
        "logical_bytes": 8 << 30,
        "new_bytes": 300 << 20,
        "seconds": 4.2,
        "read_bytes": 5 << 30,
    }
    assert document["reads"]["vda"]["since"] == "0123456789"
    assert document["reads"]["vdb"]["full_because"] == "the guest\nwas off"
    assert document["steps"] == [{"name": "capture", "seconds": 3.25}, {"name": "drain", "seconds": 6.75}]


def test_provision_in_json_has_the_promised_keys(program: Program) -> None:
    assert program("provision", "db1", "--json").json == {
        "environment": "db1-3fa9",
        "snapshot": "3fa9b0c1d2",
        "guest": "db1",
        "state": "running",
        "defined_ms": 312.0,
        "running_ms": 604.0,
        "overlay_bytes": 196608,
        "address": None,
        "expires": "2026-11-22T02:00:03Z",
        "answered_ms": None,
        "reach": "vmsnap env forward db1-3fa9 PORT",
        "dns_name": None,
        "origin": "store",
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("arguments", "reference"),
    [
        (("db1",), "db1@latest"),
        (("db1", "--at", "2026-11-21T02:00Z"), "db1@2026-11-21T02:00:00Z"),
        (("db1", "--at", "2026-11-21 03:00+01:00"), "db1@2026-11-21T02:00:00Z"),
        (("3fa9",), "3fa9"),
        (("db1@latest",), "db1@latest"),
        (("db1@2026-11-21T02:00Z",), "db1@2026-11-21T02:00Z"),
    ],
)
def test_provision_takes_a_guest_or_a_snapshot(program: Program, arguments: tuple[str, ...], reference: str) -> None:
    assert program("provision", *arguments).code == 0
    assert program.application.calls[-1][1] == reference


def test_a_guest_named_like_a_reference_is_still_a_guest(program: Program) -> None:
    program.application.stored = (sample(guest="3fa9"), sample(guest="a@latest"))
    for guest in ("3fa9", "a@latest"):
        program("provision", guest)
        assert program.application.calls[-1][1] == f"{guest}@latest"


def test_provision_passes_its_options_on(program: Program) -> None:
    outcome = program("provision", "db1", "--name", "x", "--ttl", "1d 12h", "--network", "lab", "--wait")
    assert program.application.calls[-1][2].model_dump() == {  # type: ignore[attr-defined]
        "name": "x",
        "ttl": timedelta(hours=36),
        "network": "lab",
        "wait": True,
        "origin": None,
    }
    assert outcome.stdout == (
        "Environment x is running, from snapshot 3fa9b0c1d2 of db1.\n"
        "  defined after 312 ms, running after 604 ms\n"
        "  overlay 192 KiB, address none known, expires 2026-11-22 02:00:03Z\n"
        "  a port of it: vmsnap env forward x PORT\n"
        "  'vmsnap env destroy x' removes it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("provision", "db1", "--ttl", "soon"), "--ttl: given 'soon'; a duration is"),
        (("provision", "db1", "--ttl", "0s"), "--ttl: given '0s'; it must be longer than nothing"),
        (("provision", "db1", "--at", "yesterday"), "--at: 'yesterday' is no time"),
        (("provision", "db1", "--at", "2026-11-21T02:00"), "--at: '2026-11-21T02:00' has no time zone"),
        (("pin", "3fa9", "--reason", " "), "--reason is empty"),
        (("forget", "3fa9"), "missing option '--reason'"),
        (("forget", "3fa9", "--reason", " "), "--reason is empty"),
        (("forget", "--reason", "x"), "give snapshots, or --guest"),
        (("forget", "3fa9", "--guest", "db1", "--reason", "x"), "give snapshots, or --guest"),
        (("prune", "--every", "1d"), "--every is given without --simulate"),
        (("prune", "--simulate", "soon"), "--simulate: given 'soon'"),
        (("prune", "--simulate", "1y", "--every", "0s"), "--every: given '0s'"),
        (
            ("pin", "3fa9", "--reason", "x", "--for", "1d", "--until", "2030-01-01T00:00Z"),
            "--until and --for contradict",
        ),
        (("pin", "3fa9", "--reason", "x", "--until", "2020-01-01T00:00Z"), "--until: 2020-01-01 00:00:00Z is past"),
        (("env", "extend", "e"), "say how long: --ttl, --until or --forever"),
        (("env", "extend", "e", "--ttl", "1d", "--forever"), "say how long: --ttl, --until or --forever"),
        (("env", "extend", "e", "--until", "2020-01-01T00:00Z"), "--until: 2020-01-01 00:00:00Z is past"),
        (("pin", "3fa9"), "missing option '--reason'"),
        (("backup",), "missing argument 'GUEST'"),
        (("backup", "a", "b"), "got unexpected extra argument"),
        (("bakup", "db1"), "no such command 'bakup'. Did you mean 'backup'?"),
        (("backup", "db1", "--jsn"), "no such option"),
    ],
)
def test_a_wrong_command_line_does_nothing_and_says_why(
    program: Program, arguments: tuple[str, ...], said: str
) -> None:
    for form in ((), ("--json",)):
        outcome = program(*form, *arguments)
        assert outcome.code == 2
        assert program.application.calls == []
        if form:
            assert outcome.json["error"]["brief"].startswith(said)
            assert outcome.json["error"]["exit_code"] == 2
            assert outcome.stderr == ""
        else:
            assert outcome.stdout == ""
            assert outcome.stderr.startswith(f"vmsnap: error: {said}")
            assert "vmsnap: what to do: " in outcome.stderr or said.startswith("--ttl")


def test_an_option_that_goes_before_the_command_is_explained(program: Program) -> None:
    assert "--debug goes before the command: vmsnap --debug" in program("backup", "db1", "--debug").stderr


def test_list_is_a_table_with_aligned_columns(program: Program) -> None:
    program.application.stored = (
        sample("00000000a1", captured=AT - timedelta(days=1)),
        sample(
            marks=Marks(
                pin=Pin(owner="ann", reason="audit", since=AT, until=AT + timedelta(days=9)),
                verification=Verification(at=AT, blocks=9, bad_blocks=0),
            )
        ),
        sample("00000000a2", guest="two\nwords", marks=Marks(verification=Verification(at=AT, blocks=9, bad_blocks=3))),
    )
    lines = program("list").stdout.splitlines()
    assert lines[0].split() == [
        "GUEST", "SNAPSHOT", "WHEN", "SIZE", "NEW", "PAUSE", "ENGINE", "CLEAN", "VERIFIED", "PINNED"
    ]  # fmt: skip
    assert [line[: lines[0].index("SIZE")].rstrip() for line in lines[1:]] == [
        "db1         00000000a1  2026-11-20 02:00Z",
        "db1         3fa9b0c1d2  2026-11-21 02:00Z",
        "two\\nwords  00000000a2  2026-11-21 02:00Z",
    ]
    tails = [line[lines[0].index("CLEAN") :].rstrip() for line in lines[1:]]
    assert tails == [
        "disk   never              -",
        "disk   2026-11-21         ann until 2026-11-30",
        "disk   DAMAGED, 3 blocks  -",
    ]
    assert all(line == line.rstrip() for line in lines)


def test_a_pin_that_has_ended_is_none(program: Program) -> None:
    pin = Pin(owner="bob", reason="restored", since=AT - timedelta(days=7), until=NOW)
    program.application.stored = (sample(marks=Marks(pin=pin)),)
    assert program("list").stdout.splitlines()[1].endswith("  -")
    (listed,) = program("list", "--json").json["snapshots"]
    assert (listed["pinned"], listed["pin"]["owner"]) == (False, "bob")
    assert program("show", "3fa9", "--json").json["pinned"] is False
    assert "pinned: no\n" in program("show", "3fa9").stdout
    lasting = pin.model_copy(update={"until": NOW + timedelta(seconds=1)})
    program.application.stored = (sample(marks=Marks(pin=lasting)),)
    assert program("list", "--json").json["snapshots"][0]["pinned"] is True
    assert program("show", "3fa9", "--json").json["pinned"] is True


def test_what_is_said_of_disks_that_were_captured_alone(program: Program) -> None:
    program.application.stored = (booted(),)
    assert (
        "captured  2026-11-21 02:00:03Z; its disks, frozen within 23 ms; memory was not captured; "
        "on its own disks again after 0.4 s\n"
    ) in program("backup", "db1").stdout
    assert "  disks only  " in program("list").stdout
    (listed,) = program("list", "--json").json["snapshots"]
    assert (listed["mode"], listed["memory_captured"]) == ("boot", False)
    shown = program("show", "3fa9").stdout
    assert "mode: boot\n" in shown
    assert "memory captured: no\n" in shown


def test_list_in_json(program: Program) -> None:
    assert program("list", "db1", "--json").json == {
        "snapshots": [
            {
                "snapshot": "3fa9b0c1d2",
                "guest": "db1",
                "captured": "2026-11-21T02:00:03Z",
                "logical_bytes": 8 << 30,
                "new_bytes": 300 << 20,
                "mode": "live",
                "memory_captured": True,
                "pause_ms": 23.4,
                "engine": "postgresql",
                "clean": {"proven": True, "methods": ["disk"]},
                "verified": None,
                "pin": None,
                "pinned": False,
                "parent": None,
                "copies": ["local"],
            }
        ]
    }


def test_list_says_where_copies_are(program: Program) -> None:
    away = sample("00000000a1", captured=AT - timedelta(days=40))
    program.application.replica_copies = ReplicaCopies(replica=True, snapshots=(away, sample()))
    lines = program("list", "db1").stdout.splitlines()
    assert [line[lines[0].index("COPIES") :] for line in lines] == ["COPIES", "replica only", "local, replica"]
    document = program("list", "db1", "--json").json
    assert [one["copies"] for one in document["snapshots"]] == [["local", "replica"]]
    assert [(one["snapshot"], one["copies"]) for one in document["replica_only"]] == [("00000000a1", ["replica"])]
    assert document["replica_error"] is None


def test_list_says_that_the_replica_cannot_be_asked(program: Program) -> None:
    problem = StoreUnreachableError("the replica does not answer", remedy="is the network up?")
    program.application.replica_copies = ReplicaCopies(replica=True, problem=problem)
    told = program("list", "db1").stdout
    assert "  local, replica?\n" in told
    assert told.endswith(
        "What the replica has is not known: the replica does not answer\nWhat to do: is the network up?\n"
    )
    assert program("list", "--json").json["replica_error"]["brief"] == "the replica does not answer"


def test_listing_a_guest_without_snapshots_and_one_nobody_knows(program: Program) -> None:
    program.application.stored = ()
    assert program("list", "db1").stdout == "No snapshots yet. 'vmsnap backup db1' makes one.\n"
    assert program("list", "db1", "--json").json == {"snapshots": []}
    outcome = program("list", "bd1")
    assert outcome.code == 3
    assert "did you mean 'db1'?" in outcome.stderr


def test_show_prints_everything_in_the_manifest(program: Program) -> None:
    document = program("show", "3fa9", "--json").json
    assert document == {**sample().model_dump(mode="json"), "pinned": False}
    text = program("show", "3fa9").stdout
    assert "    captured: 2026-11-21T02:00:03Z\n    pause ms: 23 ms\n" in text
    assert "    definition:\n      <domain>\n          <name>db1</name>\n      </domain>\n" in text
    assert "    - target: vda\n      image: vda.raw\n" in text

    def check(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                assert f"{name.replace('_', ' ')}:" in text
                check(item, name)
        elif isinstance(value, list):
            for item in value:
                check(item)
        elif isinstance(value, str):
            for line in value.split("\n"):
                assert line.strip() in text
        elif key.endswith("_bytes"):
            assert f"({value} bytes)" in text

    check(document)


def test_prune_says_why(program: Program) -> None:
    outcome = program("prune", "db1", "--dry-run")
    assert program.application.calls == [("prune", "db1", True, False, False)]
    assert outcome.stdout == (
        "        GUEST  SNAPSHOT    WHEN               WHY\n"
        "remove  db1    00000000a1  2026-11-12 02:00Z  beyond keep_last 7\n"
        "keep    db1    3fa9b0c1d2  2026-11-21 02:00Z  the newest; in use by an environment\n"
        "1 kept, 1 would be removed; nothing was removed: dry run.\n"
    )
    outcome = program("prune")
    assert program.application.calls[-1] == ("prune", None, False, False, False)
    assert "removed  db1    00000000a1" in outcome.stdout
    assert "3.0 MiB freed" in outcome.stdout


def test_prune_tells_of_guests_that_failed_and_of_all_others(program: Program) -> None:
    busy = BusyError("process 7 publishes snapshots of 'db2' now", remedy="try again")
    program.application.prune_failures = (PruneFailure(guest="db2", error=busy),)
    outcome = program("prune", "--many")
    assert outcome.code == 4
    assert "1 kept, 1 removed" in outcome.stdout
    assert "db2: error: process 7 publishes snapshots of 'db2' now" in outcome.stdout
    assert program.application.calls[-1] == ("prune", None, False, False, True)
    document = program("prune", "--json").json
    assert len(document["decisions"]) == 2
    assert document["failures"][0]["guest"] == "db2"


def test_gc_says_what_was_freed_and_what_waits(program: Program) -> None:
    outcome = program("gc")
    assert program.application.calls == [("collect", CollectWishes())]
    assert "Freed: 2 objects, 30.0 MiB." in outcome.stdout
    assert "4 objects, 64.0 MiB: what is found stays for 1d first." in outcome.stdout
    assert "Nothing was removed: dry run." in program("gc", "--dry-run").stdout
    program("gc", "--now", "--no-rewrite", "--wait")
    wishes = CollectWishes(grace=timedelta(0), rewrite=False, waits=True)
    assert program.application.calls[-1] == ("collect", wishes)
    document = program("gc", "--json", "--grace", "2h").json
    assert program.application.calls[-1] == ("collect", CollectWishes(grace=timedelta(hours=2)))
    assert document["removed"] == {"objects": 2, "size_bytes": 30 << 20}
    assert document["dry_run"] is False


def test_prune_in_json(program: Program) -> None:
    document = program("prune", "--json", "--dry-run").json
    assert document["dry_run"] is True
    assert [
        (item["snapshot"], item["keep"], item["reasons"], item["removed_bytes"]) for item in document["decisions"]
    ] == [
        ("00000000a1", False, ["beyond keep_last 7"], None),
        ("3fa9b0c1d2", True, ["the newest", "in use by an environment"], None),
    ]


def test_prune_says_where_the_clock_is_in_doubt(program: Program) -> None:
    program.application.doubtful = True
    outcome = program("prune", "--dry-run")
    assert "This host's clock is far ahead of the newest snapshots" in outcome.stdout
    program("prune", "--trust-clock")
    assert program.application.calls[-1] == ("prune", None, False, True, False)


def test_forget_says_what_goes_and_what_it_takes(program: Program) -> None:
    outcome = program("forget", "3fa9", "--reason", "request 4711", "--dry-run", "--replica")
    wishes = ForgetWishes(reason="request 4711", references=("3fa9",), replica=True, dry_run=True)
    assert program.application.calls == [("forget", wishes)]
    assert outcome.stdout == (
        "        WHERE    GUEST  SNAPSHOT    WHEN               ANOTHER COPY\n"
        "remove  local    db1    3fa9b0c1d2  2026-11-21 02:00Z  none is left\n"
        "remove  replica  db1    3fa9b0c1d2  2026-11-21 02:00Z  none is left\n"
        "2 copies would be removed, and 3.0 MiB freed; nothing was removed: dry run.\n"
        "It takes --yes db1:\n"
        "  no copy is left anywhere of 3fa9b0c1d2\n"
        "What only those copies needed at the replica is freed by 'vmsnap gc'.\n"
    )
    outcome = program("forget", "3fa9", "00ab", "--reason", "request 4711")
    wishes = ForgetWishes(reason="request 4711", references=("3fa9", "00ab"))
    assert program.application.calls[-1] == ("forget", wishes)
    assert outcome.stdout.splitlines()[1:] == [
        "removed  local  db1    3fa9b0c1d2  2026-11-21 02:00Z  stays",
        "1 copy removed; 3.0 MiB freed.",
    ]
    assert "was cut is finished" in program("forget", "cut", "--reason", "x").stdout


def test_forget_takes_all_of_a_guest(program: Program) -> None:
    outcome = program("forget", "--guest", "db1", "--replica", "--reason", "replaced", "--yes", "db1", "--json")
    wishes = ForgetWishes(reason="replaced", guest="db1", replica=True, confirmed="db1")
    assert program.application.calls == [("forget", wishes)]
    document = outcome.json
    assert {"guest": "db1", "dry_run": False, "reason": "replaced", "freed_bytes": 3 << 20}.items() <= document.items()
    assert [(one["snapshot"], one["place"], one["removed"], one["copy_stays"]) for one in document["snapshots"]] == [
        ("3fa9b0c1d2", "local", True, False),
        ("3fa9b0c1d2", "replica", True, False),
    ]
    assert (document["confirm"], document["replica_error"]) == (["no copy is left anywhere of 3fa9b0c1d2"], None)


def test_prune_simulates_without_removing(program: Program) -> None:
    outcome = program("prune", "db1", "--simulate", "60d", "--dry-run")
    assert program.application.calls == [("forecast", "db1", timedelta(days=60), None)]
    assert outcome.stdout == (
        "db1, 2026-11-21 to 2027-01-20 (Europe/Berlin)\n"
        "61 backups, as scheduled; 13 kept at the end, 14 at most\n"
        "\n"
        "         1       5         10        15        20        25        30\n"
        "2026-11                                          M · · · · · · · · M      2 of 10\n"
        "2026-12  · · · · · · · · · · · · · · · · · · · · · · · · · · W · · · M    2 of 31\n"
        "2027-01  · · W · · · · · · W · · · D D D W D D M                          9 of 20\n"
        "\n"
        "M keep_monthly   W keep_weekly   D keep_daily   · removed by then\n"
    )


def test_a_simulation_shows_what_is_there_already_and_several_of_a_day(program: Program) -> None:
    program.application.retention = RetentionPolicy(keep_last=12, keep_daily=2)
    pin = Pin(owner="ann", reason="audit", since=NOW)
    program.application.existing = (
        Candidate(id=SnapshotId("00000000a1"), captured=NOW - timedelta(days=800), pin=pin),
        Candidate(id=SnapshotId("00000000a2"), captured=NOW - timedelta(days=3), held=True),
        Candidate(id=SnapshotId("00000000a3"), captured=NOW - timedelta(days=4)),
    )
    outcome = program("prune", "db1", "--simulate", "14h", "--every", "2h")
    lines = outcome.stdout.splitlines()
    assert lines[1] == "8 backups, one each 2h; 11 kept at the end, 11 at most"
    assert lines[4] == "2024-09                        P                                          1 of 1"
    assert lines[5] == "2026-11                                  L U     D8                      10 of 10"
    assert lines[7] == "P pinned   U in use by an environment   D keep_daily   L keep_last   2-9+ so many of that day"


def test_a_simulation_in_json(program: Program) -> None:
    program.application.existing = (Candidate(id=SnapshotId("00000000a2"), captured=NOW, held=True),)
    (said,) = program("prune", "--simulate", "2d", "--every", "1d", "--json").json["simulations"]
    kept = said.pop("kept")
    assert said == {
        "guest": "db1",
        "time_zone": "Europe/Berlin",
        "from": "2026-11-21T08:00:03Z",
        "until": "2026-11-23T08:00:03Z",
        "every_seconds": 86400.0,
        "backups": 3,
        "most_kept": 4,
    }
    assert [(item["snapshot"], item["captured"]) for item in kept] == [
        (None, "2026-11-21T08:00:03Z"),
        ("00000000a2", "2026-11-21T08:00:03Z"),
        (None, "2026-11-22T08:00:03Z"),
        (None, "2026-11-23T08:00:03Z"),
    ]
    assert kept[-1]["rules"] == ["newest", "keep_daily", "keep_weekly", "keep_monthly"]
    assert kept[-1]["reasons"][:2] == ["the newest", "keep_daily 1 of 7"]


def test_a_simulation_on_a_terminal_is_coloured_and_fits_a_hundred_columns() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system="standard", highlight=False)
    policy = Policy(
        guest="db1",
        time_zone="America/St_Johns",
        retention=RetentionPolicy(
            keep_last=3, keep_hourly=20, keep_daily=7, keep_weekly=5, keep_monthly=12, keep_yearly=2
        ),
    )
    every = timedelta(hours=12)
    moments = every_so_often(every, now=NOW)
    said = forecast((), policy=policy, moments=moments, now=NOW, span=timedelta(days=730), every=every)
    for line in calendar_lines(said):
        console.print(line)
    text = stream.getvalue()
    # Letter and colour of each rule: black on magenta, blue, cyan, green and yellow.
    for letter, colour in (("Y", 45), ("M", 44), ("W", 46), ("D", 42), ("H", 43)):
        assert f"\x1b[1;30;{colour}m{letter}\x1b[0m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(len(line) for line in plain) < 100
    assert len([line for line in plain if re.match(r"20\d\d-\d\d ", line)]) == 25
    kept = sum(int(found[1]) for line in plain if (found := re.search(r"(\d+) of \d+$", line)))
    assert kept == len(said.kept)


def test_a_simulation_of_all_tells_of_a_policy_that_is_wrong(program: Program) -> None:
    wrong = ConfigError("db2.toml:1: wrong", remedy="correct it")
    program.application.prune_failures = (PruneFailure(guest="db2", error=wrong),)
    outcome = program("prune", "--simulate", "2d")
    assert outcome.code == 2
    assert outcome.stdout.startswith("db1, 2026-11-21 to 2026-11-23")
    assert "db2: error: db2.toml:1: wrong" in outcome.stdout
    outcome = program("prune", "--simulate", "2d", "--json")
    assert outcome.code == 2
    assert [len(outcome.json["simulations"]), outcome.json["failures"][0]["guest"]] == [1, "db2"]


def test_gc_tells_whose_copies_it_could_not_lock(program: Program) -> None:
    program.application.unlocked = ("db2.toml:1: wrong",)
    outcome = program("gc")
    assert outcome.code == 2
    assert "Freed: 2 objects, 30.0 MiB." in outcome.stdout
    assert "Not locked for longer, because a policy file is wrong: db2.toml:1: wrong." in outcome.stdout
    assert program("gc", "--json").json["unlocked"] == ["db2.toml:1: wrong"]


def test_simulations_of_no_guest_and_of_too_many_backups_are_told(program: Program) -> None:
    program.application.forecasts = ()
    assert program("prune", "--simulate", "1y").stdout == "No guest has a policy: nothing to simulate.\n"


def test_pin_says_who_why_and_until_when(program: Program) -> None:
    outcome = program("pin", "3fa9", "--reason", "audit", "--owner", "ann", "--for", "2d")
    expected = Pin(owner="ann", reason="audit", since=NOW, until=NOW + timedelta(days=2))
    assert program.application.calls == [("pin", "3fa9", expected)]
    assert outcome.stdout == "Pinned 3fa9b0c1d2 of db1 until 2026-11-23 08:00:03Z: audit\n"


def test_pin_without_an_end_belongs_to_whoever_runs_it(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "bob")
    outcome = program("pin", "3fa9", "-r", "audit", "--json")
    assert outcome.json["pin"] == {"owner": "bob", "reason": "audit", "since": "2026-11-21T08:00:03Z", "until": None}
    assert program("unpin", "3fa9").stdout == "3fa9b0c1d2 of db1 is not pinned any more.\n"
    assert program.application.calls[-1] == ("pin", "3fa9", None)


def test_verify_reads_and_repairs_the_copy_that_is_asked_for(program: Program) -> None:
    program("verify", "3fa9", "--replica", "--repair", "--sample", "0.05")
    choice = VerifyChoice(replica=True, repair=True, sample=0.05)
    assert program.application.calls[-1] == ("verify", "3fa9", choice)
    program.application.repaired = ("vda: block 7 (byte 458752): ...",)
    told = program("verify", "3fa9", "--replica", "--repair", "--sample", "0.05").stdout
    assert "Repaired in snapshot" in told
    assert "vda: block 7 (byte 458752)" in told
    assert "is intact at the replica: part 3 of 20, " in told
    program.application.repaired, program.application.defects = (), ("vda: block 7 ...",)
    outcome = program("verify", "3fa9", "--replica")
    assert outcome.code == 5
    assert "--replica --repair' repairs it where here has an intact copy" in outcome.stdout
    for wrong in (("verify", "3fa9", "--sample", "2"), ("verify", "--due", "--repair")):
        assert program(*wrong).code == 2


def test_verify_tells_intact_from_damaged(program: Program) -> None:
    outcome = program("verify", "3fa9")
    assert (outcome.code, outcome.stdout) == (0, "Snapshot 3fa9b0c1d2 is intact: 32768 blocks read in 1.9 s.\n")
    program.application.defects = tuple(f"vda: block {number} differs" for number in range(30))
    outcome = program("verify", "3fa9")
    assert outcome.code == 5
    assert "is DAMAGED: 30 defects" in outcome.stdout
    assert "and 10 more" in outcome.stdout
    outcome = program("verify", "3fa9", "--json")
    assert outcome.code == 5
    assert outcome.json["intact"] is False
    assert len(outcome.json["defects"]) == 30


def test_what_is_due_for_verification_is_verified_and_the_worst_gives_the_exit_code(program: Program) -> None:
    assert program("verify", "--due").stdout == "Nothing is due.\n"
    report = VerifyReport(snapshot=SnapshotId("3fa9b0c1d2"), blocks=32768, defects=(), seconds=1.9)
    good = VerifyEntry(guest="db1", snapshot=report.snapshot, report=report)
    program.application.verified = (good,)
    outcome = program("verify", "--due")
    assert (outcome.code, outcome.stdout.splitlines()[-1]) == (0, "1 snapshot due.")
    bad = report.model_copy(update={"defects": ("vda: block 3 differs",)})
    program.application.verified = (
        VerifyEntry(guest="db2", error=ToolError("the store is gone", remedy="mount it")),
        VerifyEntry(guest="db3", snapshot=bad.snapshot, report=bad, error=damage(bad, guest="db3")),
        good,
    )
    outcome = program("verify", "--due")
    assert outcome.code == 5
    assert "db2: vmsnap: error: the store is gone" in outcome.stdout
    assert "is DAMAGED: 1 defect" in outcome.stdout
    documents = program("verify", "--due", "--json").json["snapshots"]
    assert [item["guest"] for item in documents] == ["db2", "db3", "db1"]
    assert documents[1]["report"]["intact"] is False
    assert documents[0]["error"]["exit_code"] == 7
    for wrong in (("verify",), ("verify", "3fa9", "--due")):
        assert program(*wrong).code == 2


def test_environments_are_listed_shown_extended_and_destroyed(program: Program) -> None:
    lines = program("env", "list").stdout.splitlines()
    assert lines[1].split() == [
        "db1-test", "running", "db1", "3fa9b0c1d2", "2026-11-21", "02:00Z", "2026-11-22", "02:00Z", "fenced", "192",
        "KiB",
    ]  # fmt: skip
    assert program("env", "show", "db1-test", "--json").json == program("env", "list", "--json").json["environments"][0]
    assert "state: running\noverlay bytes: 192 KiB (196608 bytes)\n" in program("env", "show", "db1-test").stdout
    assert "until 2026-11-23 08:00:03Z" in program("env", "extend", "db1-test", "--ttl", "2d").stdout
    assert program.application.calls[-1] == ("extend", "db1-test", NOW + timedelta(days=2))
    program("env", "extend", "db1-test", "--until", "2026-12-01T00:00+01:00")
    assert program.application.calls[-1][2] == AT.replace(month=11, day=30, hour=23, minute=0, second=0)
    assert program("env", "extend", "db1-test", "--forever").stdout.endswith("stays until it is destroyed.\n")
    assert program("env", "destroy", "db1-test").stdout == "Environment db1-test is gone.\n"
    assert program("env", "destroy", "db1-test", "--json").json == {"environment": "db1-test", "destroyed": True}


def test_expired_environments_are_removed(program: Program) -> None:
    assert program("env", "expire").stdout == "No environment has expired.\n"
    environment = sample_environment().environment
    program.application.expiries = (Expiry(environment=environment, removed=True),)
    outcome = program("env", "expire")
    assert outcome.code == 0
    assert outcome.stdout == "Environment db1-test has expired (2026-11-22 02:00:03Z) and was removed.\n"
    assert program.application.calls[-1] == ("expire", False)
    stuck = BusyError("run 3fa9b0c1d2 is still at work", remedy="wait")
    program.application.expiries = (Expiry(environment=environment, removed=False, error=stuck),)
    outcome = program("env", "expire")
    assert outcome.code == 4
    assert "db1-test: vmsnap: error: run 3fa9b0c1d2 is still at work\n" in outcome.stdout
    document = program("env", "expire", "--json").json
    assert document["environments"][0]["error"]["class"] == "BusyError"
    assert (document["environments"][0]["environment"], document["dry_run"]) == ("db1-test", False)


def test_a_dry_run_says_which_environments_would_go(program: Program) -> None:
    program.application.expiries = (Expiry(environment=sample_environment().environment, removed=False),)
    outcome = program("env", "expire", "--dry-run")
    assert outcome.code == 0
    assert outcome.stdout.endswith(" and would be removed.\n")
    assert program.application.calls[-1] == ("expire", True)


def test_the_package_is_told_what_still_needs_the_program(program: Program) -> None:
    assert program("removable").stdout == "Nothing here needs vmsnap now.\n"
    journals = FileJournals(program.config.parent / "state")
    journals.begin(RunId("00000000d1"), kind=RunKind.BACKUP, guest="db1", at=NOW).close()
    outcome = program("removable")
    assert outcome.code == 4
    assert "run 00000000d1 (backup of 'db1') died and is not undone" in outcome.stderr


def test_a_port_of_an_environment_is_forwarded(program: Program) -> None:
    outcome = program("env", "forward", "db1-test", "5432", "--listen", "15432", "--wait", "2m")
    assert outcome.stdout == "127.0.0.1 port 15432 is port 5432 of db1-test (10.9.8.77), until Ctrl-C.\n"
    assert "reach" in outcome.stderr
    options = ForwardOptions(port=5432, listen_port=15432, wait=timedelta(minutes=2))
    assert program.application.calls[-1] == ("forward", "db1-test", options)
    assert program("env", "forward", "db1-test", "22", "--json").json == {
        "environment": "db1-test",
        "port": 22,
        "listen_address": "127.0.0.1",
        "listen_port": 40001,
        "address": "10.9.8.77",
    }
    program("env", "forward", "db1-test", "22", "--listen", "[::1]:0")
    assert program.application.calls[-1][2] == ForwardOptions(port=22, listen_address="::1")


@pytest.mark.parametrize("listen", ["", "x", "127.0.0.1", "127.0.0.1:", ":5432", "1.2.3.4:70000", "-1", "127.0.0.1:٣"])
def test_a_place_to_listen_that_is_none_is_refused(program: Program, listen: str) -> None:
    outcome = program("env", "forward", "db1-test", "5432", "--listen", listen)
    assert outcome.code == 2
    assert "--listen 127.0.0.1:15432" in outcome.stderr


def test_an_environment_is_served_and_registered(program: Program) -> None:
    outcome = program("env", "serve", "db1-test", "--port", "22", "--port", "6432", "--port", "22")
    assert program.application.calls[-1] == ("serve", "db1-test", ServeOptions(ports=(22, 6432)))
    assert outcome.stdout == (
        "db1-test is at 198.18.3.1, port 22, 6432, until Ctrl-C.\n  registered as db1-test.test.example\n"
    )
    served = program("env", "serve", "db1-test", "--json").json
    assert (served["service_address"], served["ports"]) == ("198.18.3.1", [22, 5432])
    assert program("env", "register", "db1-test").stdout == (
        "Environment db1-test is registered: db1-test.test.example has the address 198.18.3.1.\n"
    )


@pytest.mark.parametrize("command", ["show", "destroy"])
def test_an_unknown_environment_names_those_that_exist(program: Program, command: str) -> None:
    outcome = program("env", command, "tset")
    assert outcome.code == 3
    assert "'db1-test'" in outcome.stderr


def test_reconcile_says_what_it_undid_and_what_is_left(program: Program) -> None:
    outcome = program("reconcile")
    assert outcome.code == 0
    assert outcome.stdout == (
        "  undone  clone vmsnap-clone (run 00000000d1, guest db1)\n"
        "  undone  fence vmsnap-fence (run 00000000d1, guest db1)\n"
        "1 dead run, 2 things undone, 0 left.\n"
    )
    program.application.left = "Device or resource busy"
    outcome = program("reconcile")
    assert outcome.code == 8
    assert "  LEFT    fence vmsnap-fence (run 00000000d1, guest db1): Device or resource busy\n" in outcome.stdout
    outcome = program("reconcile", "--json")
    assert outcome.code == 8
    assert outcome.json["complete"] is False


def test_reconcile_lists_what_no_journal_knows_and_says_what_to_do(program: Program) -> None:
    program.application.unknown = UNKNOWN_RUNS
    outcome = program("reconcile")
    assert outcome.code == 0
    assert outcome.stdout.endswith(
        "1 dead run, 2 things undone, 0 left.\n"
        "Left alone, for no journal here knows the run:\n"
        "  run 00000000e1, guest db1:\n"
        "    clone vmsnap-clone-00000000e1\n"
        "    source-overlays source overlays of db1\n"
        "  run 00000000e2:\n"
        "    A TEST VM, or what is left of one: adopting it DESTROYS it, and needs --destroy-test-vms too.\n"
        "    environment db1-\\x1b[31mtest\n"
        "They may belong to another vmsnap, with another state directory or on another host: then leave them to it.\n"
        "What to do where no other vmsnap is at work, as after the state directory was lost: vmsnap reconcile --adopt RUN "
        "--dry-run, then without --dry-run.\n"
    )
    first, second = program("reconcile", "--json").json["unknown"]
    assert (first["run"], first["guest"], first["test_vm"]) == ("00000000e1", "db1", False)
    assert first["things"][0] == {"kind": "clone", "name": "vmsnap-clone-00000000e1", "guest": "db1"}
    assert second["test_vm"] is True


def test_reconcile_adopts_the_runs_that_are_named(program: Program) -> None:
    outcome = program("reconcile", "--adopt", "00000000e1", "--adopt", "00000000e2", "--destroy-test-vms")
    assert outcome.code == 0
    runs = (RunId("00000000e1"), RunId("00000000e2"))
    assert program.application.calls == [("reconcile", Adoption(runs=runs, destroy_test_vms=True))]
    outcome = program("reconcile", "--adopt", "00000000e1", "--dry-run")
    assert program.application.calls[1:] == [("reconcile", Adoption(runs=runs[:1], dry_run=True))]
    assert outcome.stdout == (
        "Would be undone, in this order (dry run: nothing was done):\n"
        "  run 00000000e1, guest db1:\n"
        "    clone vmsnap-clone-00000000e1\n"
        "    source-overlays source overlays of db1\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [("--dry-run",), ("--destroy-test-vms",), ("--adopt", "all"), ("--adopt", "00000000E1"), ("--adopt", "")],
)
def test_reconcile_adopts_nothing_that_is_not_named_exactly(program: Program, arguments: tuple[str, ...]) -> None:
    outcome = program("reconcile", *arguments)
    assert outcome.code == 2
    assert "what to do" in outcome.stderr
    assert program.application.calls == []


def test_doctor_refuses_by_its_exit_code(program: Program) -> None:
    program.application.findings = WARNED
    outcome = program("doctor", "db1")
    assert outcome.code == 0
    assert outcome.stdout == (
        "ok       store: XFS with reflinks\n"
        "warning  agent: does not answer\n"
        "         what to do: install qemu-guest-agent\n"
        "guest db1 is ready: no refusals, 1 warning.\n"
    )
    program.application.findings = REFUSED
    outcome = program("doctor")
    assert outcome.code == 3
    assert "warning  notifications: nobody is told when backups fail: " in outcome.stdout
    assert outcome.stdout.endswith("this host cannot be backed up as it is: 1 refusal, 2 warnings.\n")
    outcome = program("doctor", "--json")
    assert outcome.code == 3
    assert outcome.json["ready"] is False
    assert outcome.json["findings"][2] == {
        "check": "disk vdb", "severity": "refusal", "message": "is passed through", "remedy": "use LVM"
    }  # fmt: skip
    with program.config.open("a", encoding="utf-8") as settings:
        settings.write('[metrics]\nlisten = "127.0.0.1:9642"\n')
    assert "nobody is told" not in program("doctor").stdout


def test_policy_check_names_every_problem(program: Program) -> None:
    folder = program.config.parent / "policies"
    outcome = program("policy", "check")
    assert (outcome.code, outcome.stdout) == (0, "ok      db1.toml: guest 'db1'\n")
    (folder / "b.toml").write_text("enabld = true\n[clone]\ncpu_shares = 1\n")
    (folder / "c.toml").write_text("enabled = false\n")
    outcome = program("policy", "check")
    assert outcome.code == 2
    assert outcome.stdout.startswith(
        f"ERROR   {folder}/b.toml has 2 errors\n          {folder}/b.toml:1: enabld: unknown"
    )
    assert "ok      c.toml: guest 'c', not enabled\n" in outcome.stdout
    outcome = program("policy", "check", "--json")
    assert outcome.code == 2
    files = outcome.json["files"]
    assert [item["ok"] for item in files] == [False, True, True]
    assert files[1]["error"] is None
    assert len(files[0]["error"]["details"].splitlines()) == 2


def test_policy_check_of_an_empty_folder_says_what_to_do(program: Program) -> None:
    (program.config.parent / "policies" / "db1.toml").unlink()
    assert "Put one GUEST.toml in it" in program("policy", "check").stdout


def test_policy_show_fills_in_the_defaults(program: Program) -> None:
    text = program("policy", "show", "db1").stdout
    assert "[retention]\nkeep_last = 3\n" in text
    assert 'max_pause = "500ms"\n' in text
    document = program("policy", "show", "db1", "--json").json
    assert document["retention"]["keep_last"] == 3
    assert document["retention"]["keep_daily"] == 0
    assert document["capture"]["max_pause"] == "500ms"
    assert program("policy", "show", "none").code == 3


@pytest.mark.parametrize(
    ("behaviour", "code", "name"),
    [
        ("config", 2, "ConfigError"),
        ("precondition", 3, "PreconditionError"),
        ("busy", 4, "BusyError"),
        ("safety", 5, "NotCleanError"),
        ("deadline", 6, "DeadlineError"),
        ("driver", 7, "ToolError"),
        ("cleanup", 8, "CleanupError"),
        ("bug", 70, "BugError"),
    ],
)
def test_an_error_has_its_exit_code_and_its_remedy(program: Program, behaviour: str, code: int, name: str) -> None:
    program.application.behaviour = behaviour
    outcome = program("backup", "db1")
    assert outcome.code == code
    assert outcome.stdout == ""
    assert "vmsnap: what to do: " in outcome.stderr
    assert "Traceback" not in outcome.stderr
    outcome = program("backup", "db1", "--json")
    assert outcome.code == code
    assert outcome.stderr == ""
    error = outcome.json["error"]
    assert (error["exit_code"], error["class"]) == (code, name)
    assert error["brief"]
    assert error["remedy"]


def test_an_error_is_told_with_details_and_what_failed_besides(program: Program) -> None:
    program.application.behaviour = "safety"
    assert program("show", "3fa9").stderr == (
        "vmsnap: error: not clean\n"
        "  state: in production\n"
        "  line two\n"
        "vmsnap: what to do: look at the log\n"
        "vmsnap: also: and then the bridge stayed\n"
        "  what to do: vmsnap reconcile\n"
    )
    assert program("show", "3fa9", "--json").json["error"]["also"][0]["brief"] == "and then the bridge stayed"


def test_a_bug_shows_where_it_came_from_with_debug_only(program: Program) -> None:
    program.application.behaviour = "bug"
    outcome = program("--debug", "show", "3fa9")
    assert outcome.code == 70
    assert "ZeroDivisionError: nobody thought of this" in outcome.stderr
    assert "Traceback" in outcome.stderr
    outcome = program("--debug", "show", "3fa9", "--json")
    assert outcome.json["error"]["class"] == "BugError"
    assert "Traceback" in outcome.stderr


def test_a_snapshot_nobody_knows(program: Program) -> None:
    outcome = program("show", "zzz")
    assert outcome.code == 3
    assert "there is 3fa9b0c1d2" in outcome.stderr


def test_config_and_json_are_taken_before_and_after_the_command(program: Program) -> None:
    config = str(program.config)
    for arguments in (
        ("--json", "--config", config, "list"),
        ("list", "--json", "--config", config),
        ("--json", "list", "--config", config),
        ("--config", "/nowhere.toml", "list", "--config", config, "--json"),
    ):
        assert "snapshots" in program(*arguments, config=False).json


def test_a_missing_configuration_says_how_to_begin(program: Program) -> None:
    outcome = program("list", "--config", "/nowhere/vmsnap.toml", config=False)
    assert outcome.code == 2
    assert "there is no file '/nowhere/vmsnap.toml'" in outcome.stderr
    assert "[store]" in outcome.stderr


def _commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    def walk(command: Any, path: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            if not command.hidden:  # a unit's own
                found.append(path)
            return
        for name, sub in inner.items():
            walk(sub, (*path, name))

    walk(get_command(app), ())
    return found


def test_these_are_the_commands() -> None:
    assert sorted(" ".join(path) for path in _commands()) == [
        "backup", "daemon", "dhcp watch", "doctor", "env destroy", "env expire", "env extend", "env forward",
        "env hydrate", "env list", "env register", "env serve", "env show", "export", "forget", "gc", "history", "list",
        "metrics", "pin", "policy check", "policy show", "provision", "prune", "reconcile", "replicate", "restore",
        "run", "show", "unpin", "verify",
    ]  # fmt: skip


@pytest.mark.parametrize("path", _commands(), ids=" ".join)
def test_every_command_teaches_by_example_and_takes_json_and_config(program: Program, path: tuple[str, ...]) -> None:
    text = program(*path, "--help", config=False).stdout
    assert "For example:" in text
    # On lines of their own, so that they can be copied.
    assert [line for line in text.splitlines() if line.strip().startswith(f"vmsnap {' '.join(path)}")]
    assert "--json" in text
    assert "--config" in text


def test_help_and_version_need_no_configuration(program: Program) -> None:
    for arguments in ((), ("--help",), ("-h",), ("env", "--help"), ("--version",)):
        outcome = program(*arguments, config=False)
        assert outcome.stdout
        assert outcome.code == (0 if arguments else 2)


def test_dhcp_watch_tells_each_exchange_and_never_the_nonce(program: Program) -> None:
    outcome = program("dhcp", "watch", "db1", "--interface", "br0", "--interface", "br1")
    assert outcome.code == 0
    assert program.application.calls == [("watch_dhcp", ("db1",), ("br0", "br1"))]
    assert outcome.stdout.splitlines() == [
        "2026-11-21 02:00:03Z  db1  52:54:00:aa:00:01  192.0.2.7 from 192.0.2.1, with a nonce, VLAN 7, dhcpcd\\x1b[1m",
        "2026-11-21 02:00:03Z  db1  52:54:00:aa:00:01  192.0.2.7 from 192.0.2.1, no nonce",
        "Stopped; 2 exchanges recorded.",
    ]
    assert "0123456789abcdef" not in outcome.stdout + outcome.stderr


def test_dhcp_watch_in_json_says_how_much_it_recorded(program: Program) -> None:
    assert program("dhcp", "watch", "--json").json == {"recorded": 2}


# Due runs


def test_run_says_what_became_of_each_guest(program: Program) -> None:
    reason = "1d after the newest snapshot (2026-11-21 01:00Z)"
    later = Due(at=AT + timedelta(hours=23), reason=reason)
    retry = Due(at=AT + timedelta(minutes=15), reason=f"{reason}; an attempt failed")
    error = NotCleanError("not clean", details="state: in production", remedy="look at the log")
    program.application.entries = (
        DueEntry(guest="db\x07", outcome=Result.FAILED, due=later, error=error, following=retry),
        DueEntry(guest="db3", outcome=Result.SKIPPED, due=later, note="guest 'db3' is held by process 1 for backup"),
        DueEntry(guest="db4", outcome=Result.NOT_DUE, following=later),
        DueEntry(guest="db5", outcome=Result.DISABLED),
    )
    outcome = program("run", "--due")
    assert outcome.code == 5
    assert program.application.calls[0] == ("run_due", False)
    assert outcome.stdout == (
        "GUEST   RESULT    SNAPSHOT    NEXT               WHY\n"
        "db1     done      3fa9b0c1d2  2026-11-22 02:00Z  1d after the newest snapshot (2026-11-20 02:00Z)\n"
        "db\\x07  failed    -           2026-11-21 02:15Z  see below\n"
        f"db3     skipped   -           -                  guest 'db3' is held by process 1 for backup ({reason})\n"
        f"db4     not due   -           2026-11-22 01:00Z  {reason}\n"
        "db5     disabled  -           -                  its policy says enabled = false\n"
        "db\\x07: error: not clean\n"
        "    state: in production\n"
        "  what to do: look at the log\n"
        "1 done, 1 failed, 1 skipped, 1 not due, 1 disabled.\n"
    )


def test_run_in_json_has_one_entry_a_guest(program: Program) -> None:
    program.application.entries = (
        DueEntry(guest="off", outcome=Result.DISABLED),
        DueEntry(guest="bad", outcome=Result.FAILED, error=ConfigError("wrong", remedy="mend it")),
        DueEntry(guest="never", outcome=Result.NOT_DUE, following=Due(at=None, reason="no window opens")),
    )
    outcome = program("run", "--due", "--json")
    assert (outcome.code, outcome.stderr) == (2, "")
    document = outcome.json
    assert {"started", "finished", "dry_run", "exit_code", "guests", "replicated"} == set(document)
    assert (document["started"], document["dry_run"], document["exit_code"]) == ("2026-11-21T02:00:03Z", False, 2)
    done, off, bad, never = document["guests"]
    assert set(done) == {"guest", "result", "due", "note", "backup", "error", "next"}
    assert (done["result"], done["backup"]["snapshot"]) == ("done", "3fa9b0c1d2")
    assert done["due"] == {"at": "2026-11-21T02:00:03Z", "why": "1d after the newest snapshot (2026-11-20 02:00Z)"}
    assert done["next"]["at"] == "2026-11-22T02:00:03Z"
    assert (off["result"], off["due"], off["next"]) == ("disabled", None, None)
    assert (bad["error"]["class"], bad["error"]["remedy"]) == ("ConfigError", "mend it")
    assert never["next"] == {"at": None, "why": "no window opens"}


def test_run_says_what_it_would_do(program: Program) -> None:
    outcome = program("run", "--due", "--dry-run")
    assert outcome.code == 0
    assert program.application.calls == [("run_due", True)]
    assert outcome.stdout.endswith("1 due; nothing was begun: dry run.\n")


def test_run_needs_to_be_told_what(program: Program) -> None:
    outcome = program("run")
    assert outcome.code == 2
    assert "say 'vmsnap run --due'" in outcome.stderr
    program.application.behaviour = "busy"
    assert program("run", "--due").code == 4


def test_policy_show_says_when_the_next_runs_are(program: Program) -> None:
    text = program("policy", "show", "db1").stdout
    assert text.endswith(
        "\n# The next runs are due:\n"
        "#   2026-11-22 02:00:03Z  '02:00'\n"
        "#   2026-11-23 02:00:03Z  '02:00'\n"
        "#   2026-11-24 02:00:03Z  '02:00'\n"
    )
    assert tomllib.loads(text)["guest"] == "db1"
    document = program("policy", "show", "db1", "--json").json
    assert [run["at"][:10] for run in document["next_due"]] == ["2026-11-22", "2026-11-23", "2026-11-24"]
    program.application.runs = (Due(at=None, reason="no window opens"),)
    assert program("policy", "show", "db1").stdout.endswith("\n# No run is due: no window opens.\n")
    program.application.behaviour = "driver"
    outcome = program("policy", "show", "db1")
    assert outcome.code == 0
    assert outcome.stdout.endswith("\n# When runs are due cannot be told: qemu-img failed\n")
    (program.config.parent / "policies" / "db1.toml").write_text("enabled = false\n")
    assert program("policy", "show", "db1").stdout.endswith("\n# No run is due: enabled = false.\n")


@pytest.mark.parametrize(
    ("schedule", "warning"),
    [
        ("windows = ['2020-01-01']", "no window opens in the next ten years: it is never backed up by its schedule"),
        ("windows = ['Mon']\nblackouts = ['Mon']", "no window opens in the next ten years"),
        (
            "windows = ['2027-06-01 22:00-24:00']",
            "no run can start before 2027-06-01 22:00:00Z, when the next window opens",
        ),
        ("blackouts = ['2026-11-01..2027-01-31']", "no run can start before 2027-02-01 00:00:00Z"),
        ("calendar = ['2020-01-01']", "its schedule ends: no time of the calendar comes after"),
        ("windows = ['Sun']", None),
        ("at = ['02:00']", None),
    ],
)
def test_policy_check_warns_of_schedules_that_do_not_begin(
    program: Program, schedule: str, warning: str | None
) -> None:
    path = program.config.parent / "policies" / "db1.toml"
    path.write_text(f"[schedule]\n{schedule}\n")
    outcome = program("policy", "check")
    assert outcome.code == 0
    (entry,) = program("policy", "check", "--json").json["files"]
    if warning is None:
        assert outcome.stdout == "ok      db1.toml: guest 'db1'\n"
        assert entry["warnings"] == []
    else:
        assert f"\n        warning: {warning}" in outcome.stdout
        assert entry["warnings"][0].startswith(warning)
    path.write_text(f"enabled = false\n[schedule]\n{schedule}\n")
    assert "warning" not in program("policy", "check").stdout


def test_replicate_says_what_it_cost(program: Program) -> None:
    done = program("replicate", "3fa9")
    assert done.code == 0
    assert "Snapshot 3fa9b0c1d2 of db1 is at the replica: 3.0 MiB sent of 8.0 GiB" in done.stdout
    assert "already" in program("replicate", "there").stdout
    assert program("replicate", "3fa9", "--json").json["sent_bytes"] == 3 << 20


def test_restore_says_until_when_it_holds_what_it_brought_back(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "bob")
    assert program("restore", "3fa9").stdout == (
        "Snapshot 3fa9b0c1d2 of db1 is in the local store: 8.0 GiB in 1.5 s.\n"
        "It is pinned until 2026-11-28 02:00:03Z, for bob: restored.\n"
        "'vmsnap unpin 3fa9b0c1d2' lets it go, 'vmsnap pin 3fa9b0c1d2 --reason ... --for SPAN' holds it for longer.\n"
    )
    assert program.application.calls == [("restore", "3fa9", RestoreOptions(keep=timedelta(days=7), owner="bob"))]
    document = program("restore", "there", "--json", "--keep", "30d", "--owner", "ann").json
    assert document["there"] is True
    assert (document["pin"]["owner"], document["pin"]["until"]) == ("ann", "2026-12-21T02:00:03Z")


def test_restore_holds_nothing_where_nothing_is_to_be_held(program: Program) -> None:
    told = program("restore", "3fa9", "--keep", "0").stdout
    assert told.splitlines()[1].startswith("Nothing holds it: retention may remove it. 'vmsnap pin 3fa9b0c1d2 --reason")
    assert program("restore", "3fa9", "--keep", "0", "--json").json["pin"] is None
    for wrong in ("soon", "0d", "9000y"):
        refused = program("restore", "3fa9", "--keep", wrong)
        assert refused.code == 2
        assert "--keep" in refused.stderr
    assert len(program.application.calls) == 2


def test_export_names_what_it_made(program: Program) -> None:
    done = program("export", "3fa9", "out", "--format", "qcow2", "--from-replica", "--json")
    assert done.json["source"] == "replica"
    (path,) = done.json["files"]
    assert path.endswith("/out/vda.qcow2")
    assert path.startswith("/")
    assert path in program("export", "3fa9", "out", "--format", "qcow2").stdout
