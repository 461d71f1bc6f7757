"""The PostgreSQL engine over real servers, in a little world of namespaces that stands for a guest.

Needs root, and the server and client programs of PostgreSQL 15 (``postgresql-15``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from pwd import getpwnam
from threading import Timer

import pytest

from integration.postgresql_world import ELSEWHERE, PORT, PROGRAMS, USER, Cluster, World, say
from integration.waiting import wait_until
from vmsnap.engines.pg_control import ClusterState, parse_control_file
from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.errors import DeadlineError, NotCleanError, PreconditionError
from vmsnap.model.drain import Instance


@pytest.fixture
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="vmsnap-pg-"))
    shutil.chown(folder, USER)
    script = f"ip link set lo up && ip address add {ELSEWHERE}/32 dev lo && echo up && exec sleep 3600"
    unshare = ("unshare", "--pid", "--mount", "--net", "--fork", "--mount-proc", "--kill-child")
    holder = subprocess.Popen([*unshare, "sh", "-c", script], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield World(first=int(children[0]), folder=folder)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
        shutil.rmtree(folder)


@pytest.fixture
def cluster(world: World) -> Cluster:
    cluster = Cluster(world)
    cluster.create()
    cluster.start()
    cluster.sql("CREATE TABLE work (name text)")
    return cluster


@contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


@contextmanager
def later(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    timer = Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def set_and_reload(cluster: Cluster, name: str, value: str) -> None:
    """Change a setting, and wait until the server has read it."""
    cluster.sql(f"ALTER SYSTEM SET {name} = '{value}'")
    cluster.pg_ctl("reload")
    wait_until(lambda: cluster.sql(f"SHOW {name}") == value, what=f"{name} = {value}")


def hang_up(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def drain_and_stop(cluster: Cluster, *, seconds: float) -> tuple[int, int, int, float]:
    engine = PostgreSQL()
    report = cluster.world.drive(engine.drain(cluster.instance(), deadline=timedelta(seconds=seconds)))
    cluster.world.drive(engine.stop(cluster.instance(), deadline=timedelta(seconds=60)))
    assert_clean(cluster)
    return report.in_flight_at_start, report.finished, report.rolled_back, report.seconds


def assert_clean(cluster: Cluster) -> None:
    engine = PostgreSQL()
    said = cluster.controldata()
    assert said["Database cluster state"] == "shut down"
    inside = cluster.world.drive(engine.evidence_in_guest(cluster.instance()))
    outside = engine.judge(cluster.instance(), files=cluster.evidence_files())
    assert inside.clean
    assert outside.clean
    for name, label in (
        ("system identifier", "Database system identifier"),
        ("checkpoint", "Latest checkpoint location"),
    ):
        assert dict(inside.observed)[name] == dict(outside.observed)[name] == said[label]


def names(cluster: Cluster) -> set[str]:
    """Start the stopped server again, without recovery, and say whose work is in it."""
    log = cluster.world.folder / "main.log"
    before = log.stat().st_size
    cluster.start()
    new = log.read_bytes()[before:].decode()
    assert "was shut down at" in new
    assert "recovery" not in new
    return set(cluster.sql("SELECT DISTINCT name FROM work").split())


def test_everything_at_once_is_counted_right(cluster: Cluster) -> None:
    socket = str(cluster.world.folder)
    cluster.world.call(str(PROGRAMS / "pgbench"), "-h", socket, "-p", str(cluster.port), "-i", "-q", "postgres")
    cluster.sql("BEGIN; INSERT INTO work VALUES ('prepared'); PREPARE TRANSACTION 'two-phase'")
    load = ("-h", socket, "-p", str(cluster.port), "-c", "3", "-n", "-T", "600", "postgres")
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = "
    pgbench = f"{sessions} 'pgbench'"
    others = f"{sessions} 'psql' AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
    # The works that finish have to last until the drain has begun, on a busy machine too, and to end before its deadline.
    with ended(
        cluster.world.start(str(PROGRAMS / "pgbench"), *load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ):
        wait_until(lambda: cluster.sql(pgbench) == "3", what="pgbench's clients")
        with ended(
            cluster.execute("INSERT INTO work SELECT 'long' FROM pg_sleep(4)"),
            cluster.execute("INSERT INTO work SELECT 'remote-statement' FROM pg_sleep(4)", host=ELSEWHERE),
            cluster.leave_open("INSERT INTO work VALUES ('remote-idle')", host=ELSEWHERE),
            cluster.leave_open("INSERT INTO work VALUES ('local-idle')"),
            cluster.execute("INSERT INTO work SELECT 'endless' FROM pg_sleep(600)"),
        ):
            wait_until(lambda: cluster.sql(others) == "5", what="work of five")
            in_flight, finished, rolled_back, seconds = drain_and_stop(cluster, seconds=8)
    # pgbench's three clients are in flight or between two transactions when the lame duck begins.
    assert rolled_back == 3
    assert 2 <= finished <= 5
    assert in_flight == finished + rolled_back
    assert 8 <= seconds < 11
    assert names(cluster) == {"long", "remote-statement"}
    cluster.sql("COMMIT PREPARED 'two-phase'")
    assert "prepared" in cluster.sql("SELECT name FROM work")
    totals = (
        "SELECT (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
    )
    assert cluster.sql(totals) == "t"


def test_an_idle_server_is_drained_at_once(cluster: Cluster) -> None:
    with ended(cluster.world.start(*cluster.client(), stdin=subprocess.PIPE)):
        in_flight, finished, rolled_back, seconds = drain_and_stop(cluster, seconds=60)
    assert (in_flight, finished, rolled_back) == (0, 0, 0)
    assert seconds < 5


def test_a_remote_client_that_cannot_answer_does_not_hold_up_the_drain(cluster: Cluster) -> None:
    with ended(
        cluster.leave_open("INSERT INTO work VALUES ('remote-idle')", host=ELSEWHERE),
        cluster.world.start(*cluster.client(host=ELSEWHERE), "-c", "COPY work FROM STDIN", stdin=subprocess.PIPE),
    ):
        cluster.wait_for(2)
        in_flight, finished, rolled_back, seconds = drain_and_stop(cluster, seconds=60)
    assert (in_flight, finished, rolled_back) == (2, 0, 2)
    assert 1 <= seconds < 8
    assert names(cluster) == set()


def test_a_local_client_may_go_on_until_the_deadline(cluster: Cluster) -> None:
    client = cluster.leave_open("INSERT INTO work VALUES ('slow-thinker')", host="127.0.0.1")
    with ended(client):
        cluster.wait_for(1)
        with later(6, lambda: say(client, "COMMIT;\n")):
            in_flight, finished, rolled_back, seconds = drain_and_stop(cluster, seconds=60)
    assert (in_flight, finished, rolled_back) == (1, 1, 0)
    assert 2 < seconds < 15
    assert names(cluster) == {"slow-thinker"}


def test_a_deadline_of_nothing_rolls_back_everything(cluster: Cluster) -> None:
    with ended(cluster.execute("INSERT INTO work SELECT 'long' FROM pg_sleep(600)")):
        cluster.wait_for(1)
        assert drain_and_stop(cluster, seconds=0)[:3] == (1, 0, 1)
    assert names(cluster) == set()


def test_a_statement_of_several_transactions_is_one_work(cluster: Cluster) -> None:
    cluster.sql(
        "CREATE PROCEDURE steps() LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..8 LOOP INSERT INTO work VALUES ('step' || i); "
        "COMMIT; PERFORM pg_sleep(0.6); END LOOP; END $$"
    )
    with ended(cluster.execute("CALL steps()")):
        cluster.wait_for(1)
        assert drain_and_stop(cluster, seconds=60)[:3] == (1, 1, 0)
    assert len(names(cluster)) == 8


def test_a_commit_that_waits_for_a_standby_has_finished(cluster: Cluster) -> None:
    set_and_reload(cluster, "synchronous_standby_names", "nobody")
    cluster.sql("CHECKPOINT")  # whoever makes it also tells the others that commits wait, and does so first
    with ended(cluster.execute("INSERT INTO work VALUES ('acknowledged-by-nobody')")):
        cluster.wait_for(1)
        in_flight, finished, rolled_back, seconds = drain_and_stop(cluster, seconds=60)
    assert (in_flight, finished, rolled_back) == (1, 1, 0)
    assert seconds < 5
    assert names(cluster) == {"acknowledged-by-nobody"}


def test_the_commit_log_tells_what_became_of_those_who_left(cluster: Cluster) -> None:
    leaving = "BEGIN; INSERT INTO work VALUES ('committed-and-left'); SELECT pg_sleep(6); COMMIT"
    dying = cluster.leave_open("INSERT INTO work VALUES ('died')")
    with ended(cluster.execute(leaving), dying):
        cluster.wait_for(2)
        with later(3, lambda: hang_up(dying)):
            assert drain_and_stop(cluster, seconds=60)[:3] == (2, 1, 1)
    assert names(cluster) == {"committed-and-left"}


def test_servers_are_found_by_their_processes(world: World) -> None:
    clusters = [Cluster(world, name="one"), Cluster(world, name="two", port=PORT + 1)]
    engine = PostgreSQL()
    with pytest.raises(PreconditionError) as caught:
        world.drive(engine.discover())
    assert caught.value.remedy is not None
    assert "database.clusters" in caught.value.remedy
    for cluster in clusters:
        cluster.create()
        cluster.start()
    found = world.drive(engine.discover())
    assert {instance.data_directory: instance for instance in found} == {
        str(cluster.directory): cluster.instance() for cluster in clusters
    }
    given = world.drive(PostgreSQL(clusters=tuple(cluster.policy() for cluster in clusters)).discover())
    assert given == tuple(cluster.instance() for cluster in clusters)
    # Nobody would drain or judge the server that the policy leaves out.
    with pytest.raises(PreconditionError, match="which the policy does not name"):
        world.drive(PostgreSQL(clusters=(clusters[1].policy(),)).discover())
    clusters[0].pg_ctl("stop", "-w")
    assert world.drive(PostgreSQL(clusters=(clusters[1].policy(),)).discover()) == (clusters[1].instance(),)
    with pytest.raises(NotCleanError, match="PostgreSQL runs in the clone"):
        world.drive(engine.require_all_stopped())
    clusters[1].pg_ctl("stop", "-w")
    world.drive(engine.require_all_stopped())
    with pytest.raises(PreconditionError, match="no PostgreSQL server runs on"):
        world.drive(PostgreSQL(clusters=(clusters[1].policy(),)).discover())


def test_a_standby_is_refused(world: World, cluster: Cluster) -> None:
    copy = Cluster(world, name="copy", port=PORT + 1)
    arguments = ("-h", str(world.folder), "-p", str(cluster.port), "-D", str(copy.directory), "-R", "-c", "fast")
    world.call(str(PROGRAMS / "pg_basebackup"), *arguments)
    with (copy.directory / "postgresql.conf").open("a") as file:
        file.write(f"port = {copy.port}\n")
    copy.start()
    with pytest.raises(PreconditionError, match="standby"):
        world.drive(PostgreSQL().discover())
    with pytest.raises(PreconditionError, match="standby"):
        world.drive(PostgreSQL().drain(copy.instance(), deadline=timedelta(seconds=5)))
    assert copy.sql("SELECT pg_is_in_recovery()") == "t"
    # Its WAL sender does not hold up the primary's end.
    assert drain_and_stop(cluster, seconds=60)[:3] == (0, 0, 0)
    copy.pg_ctl("stop", "-w", "-m", "fast")
    assert not PostgreSQL().judge(copy.instance(), files=copy.evidence_files()).clean


def test_without_a_session_nothing_is_stopped(cluster: Cluster) -> None:
    cluster.sql("CREATE ROLE weak LOGIN")
    cluster.write("pg_hba.conf", "local all all reject\nhost all all 0.0.0.0/0 trust\n")
    cluster.pg_ctl("reload")
    attempt = (*cluster.client(), "-c", "SELECT 1")
    wait_until(lambda: cluster.world.call(*attempt, check=False).returncode != 0, what="the new rules")
    with pytest.raises(PreconditionError) as caught:
        cluster.world.drive(PostgreSQL().drain(cluster.instance(), deadline=timedelta(seconds=5)))
    assert "pg_hba.conf" in str(caught.value.remedy)
    assert "rejects connection" in str(caught.value.details)
    query = (str(PROGRAMS / "psql"), "-XqAt", "-h", "127.0.0.1", "-p", str(cluster.port), "-d", "postgres")
    assert cluster.world.call(*query, "-c", "SELECT 1").stdout == "1\n"


def test_a_recovery_is_trusted_by_what_the_server_says_of_itself(cluster: Cluster) -> None:
    cluster.world.drive(PostgreSQL().require_recoverable(cluster.instance()))
    for setting in ("full_page_writes", "fsync"):
        set_and_reload(cluster, setting, "off")
        with pytest.raises(PreconditionError, match=f"{setting} = off"):
            cluster.world.drive(PostgreSQL().require_recoverable(cluster.instance()))


def test_a_server_that_was_killed_is_not_clean(cluster: Cluster) -> None:
    engine = PostgreSQL()
    cluster.pg_ctl("stop", "-m", "immediate")
    inside = cluster.world.drive(engine.evidence_in_guest(cluster.instance()))
    outside = engine.judge(cluster.instance(), files=cluster.evidence_files())
    assert not inside.clean
    assert not outside.clean
    assert dict(inside.observed)["state"] == dict(outside.observed)["state"] == "in production"


def test_every_state_is_read_as_pg_controldata_reads_it(cluster: Cluster) -> None:
    control = cluster.directory / "global/pg_control"
    assert parse_control_file(control.read_bytes()).state.text == cluster.controldata()["Database cluster state"]
    cluster.pg_ctl("stop", "-w")
    original = control.read_bytes()
    assert parse_control_file(original).state is ClusterState.SHUT_DOWN
    damaged = bytearray(original)
    damaged[100] ^= 1
    control.write_bytes(damaged)
    assert not cluster.world.drive(PostgreSQL().evidence_in_guest(cluster.instance())).clean
    assert not PostgreSQL().judge(cluster.instance(), files=cluster.evidence_files()).clean
    control.write_bytes(original)
    assert_clean(cluster)


def test_stop_may_be_repeated(cluster: Cluster) -> None:
    for _ in range(2):
        cluster.world.drive(PostgreSQL().stop(cluster.instance(), deadline=timedelta(seconds=30)))
        assert_clean(cluster)


def test_a_server_that_does_not_stop_is_a_missed_deadline(cluster: Cluster) -> None:
    with ended(cluster.execute("SELECT pg_sleep(600)")):
        cluster.wait_for(1)
        pid = cluster.sql("SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")
        cluster.world.call("kill", "-STOP", pid)
        with pytest.raises(DeadlineError) as caught:
            cluster.world.drive(PostgreSQL().stop(cluster.instance(), deadline=timedelta(seconds=2)))
        cluster.world.call("kill", "-CONT", pid)
    assert "archive_command" in str(caught.value.remedy)
    cluster.world.drive(PostgreSQL().stop(cluster.instance(), deadline=timedelta(seconds=30)))
    assert_clean(cluster)


def test_a_server_that_comes_back_is_not_clean(cluster: Cluster) -> None:
    cluster.world.drive(PostgreSQL().stop(cluster.instance(), deadline=timedelta(seconds=30)))
    cluster.start()
    with pytest.raises(NotCleanError) as caught:
        cluster.world.drive(PostgreSQL().evidence_in_guest(cluster.instance()))
    assert "before_drain" in str(caught.value.remedy)
    assert not PostgreSQL().judge(cluster.instance(), files=cluster.evidence_files()).clean


def test_evidence_is_found_on_its_file_system(world: World) -> None:
    image = world.folder / "disk.img"
    image.touch()
    os.truncate(image, 200 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=60)
    point = world.folder / "mnt"
    point.mkdir()
    inside = [*world.prefix, "sh", "-ec"]
    subprocess.run([*inside, 'mount -o loop "$1" "$2"', "sh", str(image), str(point)], check=True, timeout=60)
    moved = Cluster(world, name="mnt/deep/data", port=PORT + 1)
    account = getpwnam(USER)
    prepare = 'mkdir "$1/deep"; chown "$2" "$1/deep"; ln -s "$1/deep/data" "$3"'
    link = world.folder / "link"
    subprocess.run([*inside, prepare, "sh", str(point), str(account.pw_uid), str(link)], check=True, timeout=60)
    world.call(str(PROGRAMS / "initdb"), "-D", str(moved.directory), "-A", "trust", "--no-sync")
    uuid = subprocess.run(
        ["blkid", "-o", "value", "-s", "UUID", str(image)], capture_output=True, text=True, check=True
    )
    seen_through_link = Instance(
        engine="postgresql", name="link", data_directory=str(link), programs=str(PROGRAMS), user=USER
    )
    found = world.drive(PostgreSQL().locate(seen_through_link))
    assert {item.file_system_uuid for item in found} == {uuid.stdout.strip()}
    assert [item.path for item in found][:3] == [
        "/deep/data/global/pg_control",
        "/deep/data/PG_VERSION",
        "/deep/data/postmaster.pid",
    ]
    places = {item.path.rpartition("/PG_VERSION")[0] for item in found[7:]}
    assert places == {f"/deep/data/{name}" for name in ("base", "pg_wal", "pg_xact")}
    # In memory: nothing but the mount tells it of pg_wal, and of a tablespace it is where the link leads.
    wal, memory = moved.directory / "pg_wal", world.folder / "memory"
    memory.mkdir()
    for point in (wal, memory):
        subprocess.run([*inside, 'mount -t tmpfs none "$1"', "sh", str(point)], check=True, timeout=60)
    with pytest.raises(PreconditionError, match=r"pg_wal in the guest .* has no UUID"):
        world.drive(PostgreSQL().locate(seen_through_link))
    subprocess.run([*inside, 'umount "$1"', "sh", str(wal)], check=True, timeout=60)
    tablespace = str(moved.directory / "pg_tblspc/16999")
    subprocess.run([*inside, 'ln -s "$1" "$2"', "sh", str(memory), tablespace], check=True, timeout=60)
    with pytest.raises(PreconditionError, match=r"memory in the guest .* has no UUID"):
        world.drive(PostgreSQL().locate(seen_through_link))


def test_the_script_knows_no_session_but_its_own(cluster: Cluster) -> None:
    """Settings of the account that would break the drain do not."""
    cluster.sql("ALTER ROLE postgres SET statement_timeout = '500ms'")
    cluster.sql("ALTER ROLE postgres SET default_transaction_isolation = 'serializable'")
    cluster.sql("ALTER ROLE postgres SET search_path = public")
    cluster.sql("CREATE VIEW public.pg_stat_activity AS SELECT 1 AS pid")
    with ended(cluster.execute("SET statement_timeout = 0; INSERT INTO work SELECT 'long' FROM pg_sleep(4)")):
        cluster.wait_for(1)
        assert drain_and_stop(cluster, seconds=60)[:3] == (1, 1, 0)
    assert names(cluster) == {"long"}
