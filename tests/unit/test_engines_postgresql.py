"""The PostgreSQL engine over transcripts: what it asks, and what it makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.engines import pg_discovery, pg_drain, pg_processes
from vmsnap.engines.drain_outcome import OPENED, RESULT, parse_outcome
from vmsnap.engines.guestfacts import boot_id
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.pg_drain_script import DRAIN_SCRIPT
from vmsnap.engines.pg_processes import LIST_UNITS
from vmsnap.engines.pg_recovery import SETTINGS_SCRIPT
from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.engines.registry import engine_for
from vmsnap.errors import DeadlineError, GuestCommandError, NotCleanError, PreconditionError, VmsnapError
from vmsnap.model.command import Command, CommandResult, Procedure, T
from vmsnap.model.drain import Instance
from vmsnap.model.policy import ClusterPolicy, DatabasePolicy
from vmsnap.ports.engine import Engine, GuestPath
from vmsnap.testing.fake_guest import FILE_SYSTEM_UUID, FakeGuest, run_procedure
from vmsnap.testing.fake_postgresql import FakeCluster, control_file

MINUTE = timedelta(minutes=1)
ENGINE = PostgreSQL()
INSTANCE = Instance(
    engine="postgresql",
    name="main:5432",
    data_directory="/var/lib/postgresql/15/main",
    programs="/usr/lib/postgresql/15/bin",
    user="postgres",
    version="15",
    port=5432,
    socket_directory="/var/run/postgresql",
)

# `ps -eo pid=,ppid=,state=,user:64=,comm= -ww` on a guest with two servers, a client and a look-alike, shortened.
PROCESSES = f"""\
      1       0 S {"root":<64} systemd
    612       1 S {"postgres":<64} postgres
    640     612 S {"postgres":<64} postgres
    641     612 S {"postgres":<64} postgres
    700       1 S {"a-very-long-account-name-of-somebody":<64} postmaster
    701     700 S {"a-very-long-account-name-of-somebody":<64} postmaster
    801       1 S {"root":<64} postgres_export
    900     801 S {"app":<64} psql
    950       1 Z {"postgres":<64} postgres <defunct>
    951       1 Z {"postgres":<64} postgres
"""
# What `systemctl list-units --plain --no-legend` prints: unit, load, active, sub, description (systemctl(1)).
UNITS = """\
postgresql.service            loaded active     exited       PostgreSQL RDBMS
postgresql@13-old.service     loaded failed     failed       PostgreSQL Cluster 13-old
postgresql@15-main.service    loaded active     running      PostgreSQL Cluster 15-main
postgresql@15-second.service  loaded activating auto-restart PostgreSQL Cluster 15-second
"""
# postmaster.pid of PostgreSQL 15 on Debian 12.
LOCK_FILE = """\
612
/var/lib/postgresql/15/main
1795249458
5432
/var/run/postgresql
localhost
  2229011        24
ready   
"""  # noqa: W291 - PostgreSQL pads the last line


def answer(procedure: Procedure[T], *results: CommandResult | VmsnapError) -> T:
    """Drive a procedure with ready-made results."""
    rest = list(results)
    try:
        next(procedure)
        while True:
            result = rest.pop(0)
            if isinstance(result, VmsnapError):
                procedure.throw(result)
            else:
                procedure.send(result)
    except StopIteration as stop:
        assert not rest
        finding: T = stop.value
        return finding


def said(text: str = "", *, status: int = 0, error: str = "") -> CommandResult:
    return CommandResult(exit_status=status, stdout=text.encode(), stderr=error.encode())


NO_SYSTEMD = said(status=127, error="sh: 1: systemctl: not found")


def processes(*lines: str) -> CommandResult:
    first = f"1 0 S {'root':<64} systemd"
    return said("\n".join((first, *lines, "")))


def units(*states: str) -> CommandResult:
    lines = [f"postgresql@15-{number}.service loaded {state} PostgreSQL Cluster" for number, state in enumerate(states)]
    return said("\n".join((*lines, "")))


def drained(**numbers: object) -> CommandResult:
    usual = {"in_flight": 0, "finished": 0, "rolled_back": 0, "prepared": 0, "seconds": 0.1}
    return said(f"{OPENED}\n4\n3\n{RESULT}{json.dumps(usual | numbers)}\n")


def test_the_engine_is_an_engine() -> None:
    clusters = (ClusterPolicy(data_directory="/data", programs="/usr/bin"),)
    engine: Engine = engine_for(DatabasePolicy(clusters=clusters))
    assert engine.name == "postgresql"


def test_postmasters_are_told_from_their_children() -> None:
    found = pg_processes.parse_processes(PROCESSES)
    assert [(process.pid, process.user) for process in found] == [
        (612, "postgres"),
        (700, "a-very-long-account-name-of-somebody"),
    ]


def test_the_lock_file_is_read() -> None:
    lock = pg_discovery.parse_lock_file(LOCK_FILE)
    assert lock == pg_discovery.LockFile(
        pid=612,
        data_directory="/var/lib/postgresql/15/main",
        port=5432,
        socket_directory="/var/run/postgresql",
        listen_address="localhost",
        status="ready",
    )


@given(st.text(max_size=200))
def test_any_lock_file_is_read_or_refused(text: str) -> None:
    with suppress(GuestCommandError):
        assert pg_discovery.parse_lock_file(text).data_directory


@given(st.text(max_size=400))
def test_any_process_list_is_read(text: str) -> None:
    pg_processes.parse_processes(text)


def test_all_servers_are_found() -> None:
    guest = FakeGuest(
        clusters=[
            FakeCluster(),
            FakeCluster(data_directory="/srv/pg/data", programs="/usr/pgsql-15/bin", port=5433, pid=2000, user="pg"),
        ]
    )
    first, second = run_procedure(ENGINE.discover(), guest)
    assert first == INSTANCE
    assert (second.name, second.programs, second.user, second.port) == ("data:5433", "/usr/pgsql-15/bin", "pg", 5433)


def test_servers_of_the_same_name_are_told_apart() -> None:
    guest = FakeGuest(clusters=[FakeCluster(data_directory="/a/data"), FakeCluster(data_directory="/b/data", pid=2000)])
    assert [item.name for item in run_procedure(ENGINE.discover(), guest)] == ["/a/data:5432", "/b/data:5432"]


def test_no_server_is_refused_with_the_policys_keys() -> None:
    with pytest.raises(PreconditionError) as caught:
        run_procedure(ENGINE.discover(), FakeGuest(clusters=[FakeCluster(status="")]))
    assert "[[database.clusters]]" in str(caught.value.remedy)


def test_a_server_that_ends_while_it_is_looked_at_is_left_out() -> None:
    one = processes(f"612 1 S {'postgres':<64} postgres")
    with pytest.raises(PreconditionError, match="no PostgreSQL server runs"):
        answer(ENGINE.discover(), NO_SYSTEMD, one, said(status=1), said(status=1))


def test_a_server_in_a_container_is_refused() -> None:
    links = said("/var/lib/postgresql/data\n/usr/lib/postgresql/16/bin/postgres\n")
    one = processes(f"612 1 S {'systemd-coredump':<64} postgres")
    missing = said(status=1, error="find: '/var/lib/postgresql/data': No such file or directory")
    with pytest.raises(PreconditionError, match="container"):
        answer(ENGINE.discover(), NO_SYSTEMD, one, links, missing, missing)


def test_the_programs_of_an_upgraded_server_are_found() -> None:
    links = said("/var/lib/postgresql/15/main\n/usr/lib/postgresql/15/bin/postgres (deleted)\n")
    (instance,) = answer(
        ENGINE.discover(),
        NO_SYSTEMD,
        processes(f"612 1 S {'postgres':<64} postgres"),
        links,
        said(LOCK_FILE),
        said("Database cluster state:               in production\n"),
        said("15\n"),
    )
    assert instance == INSTANCE


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (FakeCluster(state=ClusterState.IN_ARCHIVE_RECOVERY), "standby"),
        (FakeCluster(status="standby"), "standby"),
        (FakeCluster(status="starting", state=ClusterState.IN_CRASH_RECOVERY), "starting"),
        (FakeCluster(status="stopping"), "stopping"),
    ],
)
def test_a_server_that_is_not_an_open_primary_is_refused(cluster: FakeCluster, words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        run_procedure(ENGINE.discover(), FakeGuest(clusters=[cluster]))


def test_the_units_of_servers_are_read() -> None:
    found = pg_processes.parse_units(UNITS)
    assert [(unit.name, unit.active, unit.sub) for unit in found] == [
        ("postgresql.service", "active", "exited"),
        ("postgresql@13-old.service", "failed", "failed"),
        ("postgresql@15-main.service", "active", "running"),
        ("postgresql@15-second.service", "activating", "auto-restart"),
    ]
    # Old systemd marks a unit that failed.
    assert pg_processes.parse_units("* postgresql.service loaded failed failed PostgreSQL\n")[0].active == "failed"
    assert pg_processes.parse_units("0 loaded units listed.\n\nx\n") == ()


@given(st.text(max_size=200))
def test_any_list_of_units_is_read(text: str) -> None:
    pg_processes.parse_units(text)


@pytest.mark.parametrize("state", ["activating auto-restart", "activating start", "failed failed"])
def test_a_server_that_is_to_come_up_or_could_not_is_refused(state: str) -> None:
    guest = FakeGuest(clusters=[FakeCluster()], extra={LIST_UNITS: units("active running", state)})
    with pytest.raises(PreconditionError, match=r"postgresql@15-1\.service"):
        run_procedure(ENGINE.discover(), guest)


def test_a_server_that_is_about_to_be_up_is_waited_for() -> None:
    coming, up = units("activating start"), units("active running")
    one = processes(f"612 1 S {'postgres':<64} postgres")
    links = said("/var/lib/postgresql/15/main\n/usr/lib/postgresql/15/bin/postgres\n")
    looks = (said(LOCK_FILE), said("Database cluster state:               in production\n"), said("15\n"))
    assert answer(ENGINE.discover(), coming, said(), coming, said(), up, one, links, *looks) == (INSTANCE,)


def test_the_units_of_servers_that_run_or_were_stopped_are_none_to_refuse() -> None:
    guest = FakeGuest(clusters=[FakeCluster()], extra={LIST_UNITS: units("active running", "inactive dead")})
    assert run_procedure(ENGINE.discover(), guest) == (INSTANCE,)


def test_a_failed_unit_is_none_of_the_clusters_that_a_policy_names() -> None:
    policy = ClusterPolicy(data_directory=INSTANCE.data_directory, programs=INSTANCE.programs)
    guest = FakeGuest(clusters=[FakeCluster()], extra={LIST_UNITS: units("failed failed")})
    assert len(run_procedure(PostgreSQL(clusters=(policy,)).discover(), guest)) == 1
    guest.extra = {LIST_UNITS: units("activating start")}
    with pytest.raises(PreconditionError, match="activating"):
        run_procedure(PostgreSQL(clusters=(policy,)).discover(), guest)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (said(status=127, error="ps: not found"), "cannot list"),
        (said(status=1, error="error: unsupported option"), "cannot list"),
        (replace(processes(), truncated=True), "too long"),
        (said(""), "not complete"),
        # With hidepid, an account sees its own processes alone.
        (said(f"900 1 S {'postgres':<64} sshd\n"), "not complete"),
    ],
)
def test_without_the_whole_list_of_processes_nothing_is_believed(listed: CommandResult, words: str) -> None:
    policy = ClusterPolicy(data_directory=INSTANCE.data_directory, programs=INSTANCE.programs)
    named = PostgreSQL(clusters=(policy,)).discover()
    control = said("Database cluster state:               in production\n")
    with pytest.raises(GuestCommandError, match=words):
        answer(named, NO_SYSTEMD, said(LOCK_FILE), control, said("15\n"), listed)
    with pytest.raises(GuestCommandError, match=words):
        answer(ENGINE.discover(), NO_SYSTEMD, listed)
    with pytest.raises(GuestCommandError, match=words):
        answer(ENGINE.require_all_stopped(), listed)


def test_processes_are_listed_as_root() -> None:
    guest = FakeGuest(clusters=[FakeCluster()])
    run_procedure(ENGINE.discover(), guest)
    (listing,) = [command for command in guest.commands if command.argv == pg_processes.LIST_PROCESSES]
    assert listing.user == "root"


def test_nothing_may_be_left_when_all_were_stopped() -> None:
    guest = FakeGuest(clusters=[FakeCluster(status="")])
    run_procedure(ENGINE.require_all_stopped(), guest)
    guest.clusters.append(FakeCluster(data_directory="/srv/late", pid=2000))
    with pytest.raises(NotCleanError, match=r"process id 2000 \(as postgres\)") as caught:
        run_procedure(ENGINE.require_all_stopped(), guest)
    assert "before_drain" in str(caught.value.remedy)


def test_a_server_is_given_a_moment_to_end() -> None:
    ending = processes(f"612 1 S {'postgres':<64} postgres")
    answer(ENGINE.require_all_stopped(), ending, said(), ending, said(), processes(), NO_SYSTEMD)


@pytest.mark.parametrize(
    ("state", "left"), [("activating auto-restart", True), ("failed failed", False), ("inactive dead", False)]
)
def test_a_server_that_systemd_is_to_start_again_is_left(state: str, *, left: bool) -> None:
    guest = FakeGuest(extra={LIST_UNITS: units(state)})
    if not left:
        run_procedure(ENGINE.require_all_stopped(), guest)
        return
    with pytest.raises(NotCleanError, match="auto-restart"):
        run_procedure(ENGINE.require_all_stopped(), guest)


def test_a_recovery_is_trusted_where_the_servers_writes_have_an_order() -> None:
    guest = FakeGuest(clusters=[FakeCluster()])
    run_procedure(ENGINE.require_recoverable(INSTANCE), guest)
    (command,) = guest.commands
    assert (command.user, command.stdin) == ("postgres", SETTINGS_SCRIPT.encode())


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_a_recovery_without_order_or_whole_pages_is_not_trusted(name: str) -> None:
    cluster = FakeCluster()
    cluster.settings[name] = "off"
    with pytest.raises(PreconditionError, match=f"with {name} = off") as caught:
        run_procedure(ENGINE.require_recoverable(INSTANCE), FakeGuest(clusters=[cluster]))
    assert "capture.mode" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "result",
    [
        said(f"{OPENED}\n"),
        said(f"{OPENED}\nvmsnap-setting fsync on\n"),
        said(f"{OPENED}\nvmsnap-setting fsync on\nvmsnap-setting full_page_writes on\n", status=3),
        said(f"{OPENED}\nvmsnap-setting fsync\nvmsnap-setting full_page_writes on\n"),
    ],
)
def test_settings_that_were_not_told_are_not_taken_for_safe(result: CommandResult) -> None:
    with pytest.raises(GuestCommandError, match="cannot read the settings"):
        answer(ENGINE.require_recoverable(INSTANCE), result)


def test_a_policys_clusters_are_taken_and_no_others() -> None:
    policy = ClusterPolicy(data_directory="/srv/data", programs="/opt/pg/bin", user="pg", port=5433)
    other = FakeCluster()
    named = FakeCluster(data_directory="/srv/data", programs="/opt/pg/bin", user="pg", port=5433, pid=2000)
    (instance,) = run_procedure(PostgreSQL(clusters=(policy,)).discover(), FakeGuest(clusters=[named]))
    assert (instance.data_directory, instance.programs, instance.user) == ("/srv/data", "/opt/pg/bin", "pg")
    assert instance.socket_directory == "/var/run/postgresql"
    with pytest.raises(PreconditionError, match=f"process id {other.pid} .* does not name"):
        run_procedure(PostgreSQL(clusters=(policy,)).discover(), FakeGuest(clusters=[other, named]))
    named.crash()
    with pytest.raises(PreconditionError, match="/srv/data"):
        run_procedure(PostgreSQL(clusters=(policy,)).discover(), FakeGuest(clusters=[other, named]))
    with pytest.raises(GuestCommandError, match="/srv/data"):
        run_procedure(PostgreSQL(clusters=(policy,)).discover(), FakeGuest(clusters=[other]))


def test_drain_counts_and_asks_in_one_session() -> None:
    cluster = FakeCluster(will_finish=3, will_hang=2)
    guest = FakeGuest(clusters=[cluster])
    report = run_procedure(ENGINE.drain(INSTANCE, deadline=MINUTE), guest)
    assert (report.in_flight_at_start, report.finished, report.rolled_back) == (5, 3, 2)
    assert (report.engine, report.instance, report.seconds) == ("postgresql", "main:5432", 0.1)
    (command,) = guest.commands
    assert command.user == "postgres"
    assert command.timeout is not None
    assert command.timeout > MINUTE
    assert command.stdin.decode() == DRAIN_SCRIPT


def test_nothing_is_pasted_into_the_drains_script() -> None:
    evil = replace(INSTANCE, data_directory="/data'; DROP TABLE x; \\! rm -rf / --", socket_directory="/tmp/$(id)")
    command = pg_drain.session(evil, program="psql", database="postgres", deadline=MINUTE)
    assert command.stdin.decode() == DRAIN_SCRIPT
    assert f"VMSNAP_PGDATA={evil.data_directory}" in command.argv
    assert evil.socket_directory in command.argv


def test_prepared_transactions_are_told(caplog: pytest.LogCaptureFixture) -> None:
    run_procedure(ENGINE.drain(INSTANCE, deadline=MINUTE), FakeGuest(clusters=[FakeCluster(prepared=2)]))
    assert "2 prepared transactions" in caplog.text


def test_a_missing_psql_is_looked_for_in_the_path() -> None:
    asked: list[Command] = []

    def record(procedure: Procedure[T]) -> Procedure[T]:
        command = next(procedure)
        while True:
            asked.append(command)
            result = yield command
            try:
                command = procedure.send(result)
            except StopIteration as stop:
                finding: T = stop.value
                return finding

    answer(record(ENGINE.drain(INSTANCE, deadline=MINUTE)), said(status=127), drained())
    assert [next(word for word in command.argv if word.endswith("psql")) for command in asked] == [
        "/usr/lib/postgresql/15/bin/psql",
        "psql",
    ]


def test_another_database_is_tried_before_giving_up() -> None:
    no_database = said(status=2, error='psql: error: FATAL:  database "postgres" does not exist')
    report = answer(ENGINE.drain(INSTANCE, deadline=MINUTE), no_database, drained(in_flight=1, finished=1))
    assert report.finished == 1


def test_without_a_session_the_drain_refuses_and_says_how_to_mend_it() -> None:
    rejected = said(status=2, error='FATAL:  Peer authentication failed for user "postgres"')
    with pytest.raises(PreconditionError) as caught:
        answer(ENGINE.drain(INSTANCE, deadline=MINUTE), rejected, rejected)
    assert "pg_hba.conf" in str(caught.value.remedy)
    assert "Peer authentication failed" in str(caught.value.details)


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (
            said(f"{OPENED}\n", status=3, error="psql:<stdin>:22: ERROR:  vmsnap: the server is a standby"),
            PreconditionError,
            "standby",
        ),
        (
            said(f"{OPENED}\n", status=3, error="psql:<stdin>:22: ERROR:  vmsnap: app is no superuser"),
            PreconditionError,
            "superuser",
        ),
        (
            said(f"{OPENED}\n", status=3, error="ERROR:  vmsnap: the server does not refuse sessions"),
            GuestCommandError,
            "broke off",
        ),
        (
            said(f"{OPENED}\n", status=2, error="server closed the connection unexpectedly"),
            GuestCommandError,
            "broke off",
        ),
        (said(f"{OPENED}\n"), GuestCommandError, "makes no sense"),
        (said(f"{OPENED}\n{RESULT}" + "{}\n"), GuestCommandError, "makes no sense"),
        (said(f"{OPENED}\n{RESULT}not json\n"), GuestCommandError, "makes no sense"),
        (drained(in_flight="1"), GuestCommandError, "makes no sense"),
        (drained(in_flight=-1, finished=-1), GuestCommandError, "makes no sense"),
        (drained(in_flight=3, finished=1, rolled_back=1), GuestCommandError, "do not add up"),
        (drained(surplus=1), GuestCommandError, "makes no sense"),
        (said(drained().text + f"{RESULT}{{}}\n"), GuestCommandError, "makes no sense"),
    ],
)
def test_a_drain_that_broke_off_is_an_error(result: CommandResult, error: type[VmsnapError], words: str) -> None:
    with pytest.raises(error, match=words):
        answer(ENGINE.drain(INSTANCE, deadline=MINUTE), result)


@given(st.text(max_size=100))
def test_any_answer_of_a_drain_is_read_or_refused(text: str) -> None:
    with pytest.raises(GuestCommandError):
        parse_outcome(said(f"{OPENED}\n{RESULT}{text}"))


def test_stop_is_fast_and_never_immediate() -> None:
    guest = FakeGuest(clusters=[FakeCluster()])
    run_procedure(ENGINE.stop(INSTANCE, deadline=timedelta(seconds=90.5)), guest)
    assert guest.clusters[0].state is ClusterState.SHUT_DOWN
    (stop,) = [command for command in guest.commands if "stop" in command.argv]
    assert stop.argv[-7:] == ("-D", INSTANCE.data_directory, "-m", "fast", "-w", "-t", "91")
    assert stop.timeout is not None
    assert stop.timeout > timedelta(seconds=91)


def test_stop_of_a_stopped_server_does_nothing() -> None:
    guest = FakeGuest(clusters=[FakeCluster(status="", state=ClusterState.SHUT_DOWN)])
    run_procedure(ENGINE.stop(INSTANCE, deadline=MINUTE), guest)
    assert not [command for command in guest.commands if "stop" in command.argv]


def test_a_server_that_does_not_stop_is_a_missed_deadline() -> None:
    with pytest.raises(DeadlineError) as caught:
        run_procedure(ENGINE.stop(INSTANCE, deadline=MINUTE), FakeGuest(clusters=[FakeCluster(stop_fails=True)]))
    assert "stop_deadline" in str(caught.value.remedy)


def test_a_server_that_something_starts_again_is_not_clean() -> None:
    guest = FakeGuest(clusters=[FakeCluster(comes_back=True)])
    for procedure in (ENGINE.stop(INSTANCE, deadline=MINUTE), ENGINE.evidence_in_guest(INSTANCE)):
        with pytest.raises(NotCleanError) as caught:
            run_procedure(procedure, guest)
        assert "before_drain" in str(caught.value.remedy)


def test_a_stop_nobody_understands_is_an_error() -> None:
    lock = said(LOCK_FILE)
    refused = said(status=1, error="pg_ctl: could not send stop signal (PID: 612): Operation not permitted")
    with pytest.raises(GuestCommandError, match="cannot stop"):
        answer(ENGINE.stop(INSTANCE, deadline=MINUTE), lock, refused, lock)
    with pytest.raises(NotCleanError, match="still there"):
        answer(ENGINE.stop(INSTANCE, deadline=MINUTE), lock, said("server stopped"), lock)


def test_a_data_directory_that_cannot_be_read_is_not_a_stopped_server() -> None:
    denied = said(status=1, error="find: '/var/lib/postgresql/15/main': Permission denied")
    with pytest.raises(GuestCommandError, match="cannot read"):
        answer(ENGINE.stop(INSTANCE, deadline=MINUTE), denied, denied)


def test_a_server_that_goes_while_its_lock_file_is_read_has_stopped() -> None:
    gone = said(status=1, error="cat: .../postmaster.pid: No such file or directory")
    answer(ENGINE.stop(INSTANCE, deadline=MINUTE), gone, said())


@pytest.mark.parametrize("state", ClusterState)
def test_evidence_is_clean_in_one_state_alone(state: ClusterState) -> None:
    guest = FakeGuest(clusters=[FakeCluster(status="", state=state)])
    inside = run_procedure(ENGINE.evidence_in_guest(INSTANCE), guest)
    outside = ENGINE.judge(INSTANCE, files=tuple(guest.file(path) for path in ENGINE.evidence_paths(INSTANCE)))
    assert inside.clean is outside.clean is (state is ClusterState.SHUT_DOWN)
    assert (inside.method, outside.method) == ("in-guest", "disk")
    for evidence in (inside, outside):
        observed = dict(evidence.observed)
        assert observed["state"] == state.text
        assert observed["system identifier"] == "7710537706371104660"
        assert observed["checkpoint"] == "0/1511A88"


def test_a_warning_of_pg_controldata_is_not_clean() -> None:
    text = "WARNING: Calculated CRC checksum does not match value stored in file.\nDatabase cluster state: shut down\n"
    assert not answer(ENGINE.evidence_in_guest(INSTANCE), said(), said(text)).clean
    with pytest.raises(GuestCommandError, match="makes no sense"):
        answer(ENGINE.evidence_in_guest(INSTANCE), said(), said("nothing of the kind"))


def files(**changes: bytes | None) -> tuple[bytes | None, ...]:
    usual: dict[str, bytes | None] = {"pg_control": control_file(ClusterState.SHUT_DOWN), "PG_VERSION": b"15\n"}
    names = [path.rpartition("/")[2] for path in ENGINE.evidence_paths(INSTANCE)]
    assert set(changes) <= set(names)
    return tuple((usual | changes).get(name) for name in names)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pg_control", None),
        ("pg_control", b""),
        ("pg_control", bytes(8192)),
        ("PG_VERSION", None),
        ("postmaster.pid", b""),
        ("backup_label", b"START WAL LOCATION"),
        ("standby.signal", b""),
        ("recovery.signal", b""),
        ("recovery.conf", b""),
    ],
)
def test_one_bad_file_is_enough(name: str, content: bytes | None) -> None:
    assert ENGINE.judge(INSTANCE, files=files()).clean
    assert not ENGINE.judge(INSTANCE, files=files(**{name: content})).clean


@given(st.tuples(*[st.one_of(st.none(), st.binary(max_size=400))] * 7))
def test_judge_never_calls_noise_clean(content: tuple[bytes | None, ...]) -> None:
    assert not ENGINE.judge(INSTANCE, files=content).clean


def test_evidence_is_located() -> None:
    guest = FakeGuest(clusters=[FakeCluster()])
    found = run_procedure(ENGINE.locate(INSTANCE), guest)
    folders = [f"{INSTANCE.data_directory}/{name}/PG_VERSION" for name in ("base", "pg_wal", "pg_xact")]
    assert found == tuple(
        GuestPath(file_system_uuid=FILE_SYSTEM_UUID, path=path) for path in (*ENGINE.evidence_paths(INSTANCE), *folders)
    )


def mount(*, target: str = "/", uuid: str | None = FILE_SYSTEM_UUID, fsroot: str = "/") -> CommandResult:
    entry = {"source": "/dev/vdb[/@data]", "target": target, "fstype": "btrfs", "uuid": uuid, "fsroot": fsroot}
    return said(json.dumps({"filesystems": [entry]}))


def plain_folders() -> tuple[CommandResult, ...]:
    """The folders beside the evidence, on an ordinary disk."""
    return tuple(result for name in ("base", "pg_wal", "pg_xact") for result in (said(f"/d/{name}\0"), mount()))


def test_links_subvolumes_and_bind_mounts_are_seen_through() -> None:
    found = answer(
        ENGINE.locate(INSTANCE),
        said(),
        *plain_folders(),
        said("/srv/pg/main/global\0"),
        mount(target="/srv/pg", fsroot="/@data/pg"),
        said("/srv/pg/main\0"),
        mount(target="/srv/pg", fsroot="/@data/pg"),
    )
    assert found[0].path == "/@data/pg/main/global/pg_control"
    assert found[2].path == "/@data/pg/main/postmaster.pid"


def test_a_uuid_that_findmnt_does_not_know_is_read_from_the_device() -> None:
    unknown = mount(uuid=None)
    found = answer(
        ENGINE.locate(INSTANCE),
        said(),
        *(said("/d/base\0"), unknown, said("from-the-device\n")) * 3,
        *(said("/d/global\0"), unknown, said("from-the-device\n")),
        *(said("/d\0"), unknown, said("from-the-device\n")),
    )
    assert {item.file_system_uuid for item in found} == {"from-the-device"}


def test_a_tablespace_that_is_on_no_disk_is_refused() -> None:
    link = said(f"{INSTANCE.data_directory}/pg_tblspc/16400\0")
    nfs = (said("/mnt/nfs\0"), mount(target="/mnt/nfs", uuid=None), said(status=2))
    with pytest.raises(PreconditionError, match="no UUID"):
        answer(ENGINE.locate(INSTANCE), link, *plain_folders(), *nfs)


@pytest.mark.parametrize("number", range(3))
def test_a_folder_that_is_a_mount_on_no_disk_is_refused(number: int) -> None:
    """pg_wal on tmpfs, say: nothing but the mount tells, for there is no link."""
    before = plain_folders()[: 2 * number]
    memory = (said("/d/x\0"), mount(target="/d/x", uuid=None), said(status=2))
    with pytest.raises(PreconditionError, match="no UUID"):
        answer(ENGINE.locate(INSTANCE), said(), *before, *memory)


@pytest.mark.parametrize("text", ["", "{}", '{"filesystems": []}', "[1]", '{"filesystems": [{"target": 1}]}', "\xff"])
def test_rubbish_of_findmnt_is_refused(text: str) -> None:
    with pytest.raises(GuestCommandError, match="findmnt"):
        answer(ENGINE.locate(INSTANCE), said(), said("/d/global\0"), said(text))


@pytest.mark.parametrize(
    ("step", "before"),
    [(ENGINE.discover, (NO_SYSTEMD,)), (lambda: ENGINE.locate(INSTANCE), ()), (boot_id, ())],
)
def test_a_failing_command_is_named(step: Callable[[], Procedure[object]], before: tuple[CommandResult, ...]) -> None:
    with pytest.raises(GuestCommandError) as caught:
        answer(step(), *before, said(status=1, error="it broke"))
    assert "status 1" in caught.value.brief
    assert caught.value.details == "it broke"


def test_the_boot_id_is_read_or_refused() -> None:
    guest = FakeGuest()
    assert run_procedure(boot_id(), guest) == guest.boot_id
    with pytest.raises(GuestCommandError, match="boot id"):
        answer(boot_id(), said("rubbish"))
