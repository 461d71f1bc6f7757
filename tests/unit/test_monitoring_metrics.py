"""Metrics as Prometheus reads them, by HTTP and from a file."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.unit.cli_samples import sample
from tests.unit.listener import threads_ended
from vmsnap import __version__
from vmsnap.errors import PreconditionError
from vmsnap.model.alarms import Alarm, AlarmKind, Breach, Ledger, Raised
from vmsnap.model.facts import Facts, GuestFacts, Room
from vmsnap.model.freshness import Expected
from vmsnap.model.history import RunEntry, RunOutcome, RunResult, RunStep, Starter, Trigger
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import Due, FailedAttempt
from vmsnap.monitoring.exposition import Endpoint, Shelf, text_of, write_textfile
from vmsnap.monitoring.metrics import MOST_STEPS, metrics_of

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
LAST = RunEntry(
    run=RunId("00000000a1"),
    kind=RunKind.BACKUP,
    guest="db",
    started=NOW - HOUR,
    starter=Starter(trigger=Trigger.DAEMON),
    steps=(
        RunStep(name="capture", began_after_seconds=1, seconds=2.5),
        RunStep(name="prune", began_after_seconds=9, seconds=0.25),
        RunStep(name="capture", began_after_seconds=10, seconds=1),
    ),
    ended=NOW - HOUR / 2,
    seconds=1800.0,
    result=RunResult(outcome=RunOutcome.FAILED),
)
DB = GuestFacts(
    guest="db",
    policy=Policy(guest="db"),
    snapshots=3,
    newest=sample(guest="db", captured=NOW - 2 * HOUR),
    verified=NOW - 3 * HOUR,
    damaged=1,
    due=Due(at=NOW + HOUR, reason=""),
    expected=Expected(start=NOW - 2 * HOUR, deadline=NOW - HOUR, closes=NOW - HOUR / 2),
    failures=(FailedAttempt(began=NOW), FailedAttempt(began=NOW)),
    last=LAST,
    pruned=NOW - HOUR / 4,
    environments=2,
    environments_expired=1,
    newest_copy=NOW - 5 * HOUR,
    copies_lacking=4,
)
FACTS = Facts(
    at=NOW,
    guests=(
        DB,
        GuestFacts(guest="new", policy=Policy(guest="new")),
        GuestFacts(guest="orphan", policy=None, snapshots=1),
    ),
    store=Room(free_bytes=1 << 40, size_bytes=1 << 41),
    overlay_free_bytes={"db": 1 << 30},
)
LEDGER = Ledger(
    raised=(Raised(alarm=Alarm(guest="db", kind=AlarmKind.OVERDUE, text="late"), since=NOW),),
    breaches={"db": Breach(at=NOW - HOUR, text="a frame", count=2)},
    message=NOW - HOUR,
)


def families(text: bytes) -> dict[str, Family]:
    return {family.name: family for family in parse(text.decode())}


def values(text: bytes, name: str) -> dict[str, float]:
    return {
        ",".join(value for _, value in sorted(item.labels.items())): item.value for item in families(text)[name].samples
    }


TEXT = text_of(metrics_of(FACTS, ledger=LEDGER))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vmsnap_build_info", {__version__: 1}),
        ("vmsnap_facts_timestamp_seconds", {"": NOW.timestamp()}),
        ("vmsnap_alarms", {"": 1}),
        ("vmsnap_alarms_untold", {"": 1}),
        ("vmsnap_problems", {"": 0}),
        ("vmsnap_store_free_bytes", {"": 1 << 40}),
        ("vmsnap_last_notification_timestamp_seconds", {"": (NOW - HOUR).timestamp()}),
        ("vmsnap_guest_enabled", {"db": 1, "new": 1, "orphan": 0}),
        ("vmsnap_guest_snapshots", {"db": 3, "new": 0, "orphan": 1}),
        ("vmsnap_guest_newest_snapshot_timestamp_seconds", {"db": (NOW - 2 * HOUR).timestamp()}),
        ("vmsnap_guest_last_verification_timestamp_seconds", {"db": (NOW - 3 * HOUR).timestamp()}),
        ("vmsnap_guest_damaged_snapshots", {"db": 1, "new": 0, "orphan": 0}),
        ("vmsnap_guest_next_run_timestamp_seconds", {"db": (NOW + HOUR).timestamp()}),
        ("vmsnap_guest_backup_deadline_timestamp_seconds", {"db": (NOW - HOUR).timestamp()}),
        ("vmsnap_guest_overdue", {"db": 1, "new": 0}),
        ("vmsnap_guest_missed_window", {"db": 1, "new": 0}),
        ("vmsnap_guest_failed_attempts", {"db": 2, "new": 0}),
        ("vmsnap_guest_last_run_outcome", {"db,done": 0, "db,failed": 1, "db,stopped": 0, "db,died": 0}),
        ("vmsnap_guest_last_run_step_seconds", {"db,capture": 3.5, "db,prune": 0.25}),
        ("vmsnap_guest_last_run_seconds", {"db": 1800}),
        ("vmsnap_guest_last_run_end_timestamp_seconds", {"db": (NOW - HOUR / 2).timestamp()}),
        ("vmsnap_guest_last_prune_timestamp_seconds", {"db": (NOW - HOUR / 4).timestamp()}),
        ("vmsnap_guest_snapshot_pause_seconds", {"db": 0.0234}),
        ("vmsnap_guest_hints_distrusted", {"db": 0}),
        ("vmsnap_guest_overlay_free_bytes", {"db": 1 << 30}),
        ("vmsnap_guest_newest_copy_timestamp_seconds", {"db": (NOW - 5 * HOUR).timestamp()}),
        ("vmsnap_guest_copies_lacking", {"db": 4}),
        ("vmsnap_guest_environments", {"db": 2, "new": 0, "orphan": 0}),
        ("vmsnap_guest_environments_expired", {"db": 1, "new": 0, "orphan": 0}),
        ("vmsnap_guest_isolation_breaches", {"db": 2, "new": 0, "orphan": 0}),
        ("vmsnap_guest_last_isolation_breach_timestamp_seconds", {"db": (NOW - HOUR).timestamp()}),
    ],
)
def test_a_metric_says_what_is_so(name: str, expected: dict[str, float]) -> None:
    assert values(TEXT, name) == pytest.approx(expected)


def test_bytes_are_those_of_the_newest_snapshot() -> None:
    assert DB.newest is not None
    store = DB.newest.manifest.store
    assert values(TEXT, "vmsnap_guest_snapshot_logical_bytes") == {"db": store.logical_bytes}
    assert values(TEXT, "vmsnap_guest_snapshot_new_bytes") == {"db": store.new_bytes}
    assert values(TEXT, "vmsnap_guest_snapshot_read_bytes") == {"db": store.read_bytes}


def test_names_and_labels_follow_the_practice() -> None:
    for name, family in families(TEXT).items():
        assert re.fullmatch(r"vmsnap_[a-z_]+", name)
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
        assert not name.endswith(("_ms", "_total", "_count"))
        if any(item.value > 1e9 for item in family.samples):
            assert name.endswith(("_timestamp_seconds", "_bytes")), name
        for item in family.samples:
            assert set(item.labels) <= {"guest", "outcome", "step", "version"}


def test_every_metric_is_there_for_an_empty_host_too() -> None:
    empty = text_of(metrics_of(Facts(at=NOW, guests=()), ledger=Ledger()))
    assert set(families(empty)) == set(families(TEXT))


def test_the_number_of_series_grows_with_guests_and_nothing_else() -> None:
    def count(*guests: GuestFacts, ledger: Ledger = LEDGER) -> int:
        return sum(len(metric.samples) for metric in metrics_of(replace(FACTS, guests=guests), ledger=ledger))

    one = count(DB)
    steps = tuple(RunStep(name=f"step {number}", began_after_seconds=0, seconds=1) for number in range(1000))
    assert count(replace(DB, last=replace(LAST, steps=steps))) <= one + MOST_STEPS
    other = replace(
        DB, newest=sample("00000000ff", guest="db"), failures=DB.failures * 50, last=replace(LAST, run=RunId("b" * 10))
    )
    assert count(other, ledger=replace(LEDGER, raised=LEDGER.raised * 50)) == one
    assert count(*(replace(DB, guest=f"vm{number}") for number in range(500))) <= 500 * one


def test_any_name_of_a_guest_can_be_read_back() -> None:
    names = ['d"b\\', "new\nline", "\N{SNOWMAN}", "a b", "{}=,"]
    guests = tuple(replace(DB, guest=name) for name in names)
    text = text_of(metrics_of(replace(FACTS, guests=guests), ledger=LEDGER))
    assert set(values(text, "vmsnap_guest_snapshots")) == set(names)
    broken = text_of(metrics_of(replace(FACTS, guests=(replace(DB, guest="\udcff"),)), ledger=LEDGER))
    assert set(values(broken, "vmsnap_guest_snapshots")) == {"\\udcff"}


# A file for node_exporter


def test_a_textfile_is_replaced_at_once_and_readable_for_all(tmp_path: Path) -> None:
    path = tmp_path / "vmsnap.prom"
    path.write_text("old")
    write_textfile(path, metrics=metrics_of(FACTS, ledger=LEDGER))
    assert path.read_bytes() == TEXT
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "vmsnap.prom"
    write_textfile(path, metrics=metrics_of(FACTS, ledger=LEDGER))
    seen: set[int] = set()
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.add(len(path.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        write_textfile(path, metrics=metrics_of(FACTS, ledger=LEDGER))
    ended.set()
    reader.join()
    assert seen == {len(TEXT)}


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot write the metrics") as caught:
        write_textfile(tmp_path / "no" / "vmsnap.prom", metrics=())
    assert caught.value.remedy


# The endpoint


@pytest.fixture(autouse=True)
def _no_thread_goes_on() -> Iterator[None]:
    with threads_ended():
        yield


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, Shelf]]:
    shelf = Shelf()
    opened = Endpoint(IPv4Address("127.0.0.1"), port=0, shelf=shelf)
    try:
        yield opened, shelf
    finally:
        opened.close()


def scrape(port: int, *, accept: str = "") -> tuple[str, bytes]:
    request = Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urlopen(request, timeout=10) as answer:  # noqa: S310 - our own, at loopback
        return answer.headers["Content-Type"], answer.read()


def test_prometheus_is_answered_with_the_last_look(endpoint: tuple[Endpoint, Shelf]) -> None:
    opened, shelf = endpoint
    assert scrape(opened.port)[1] == b""
    shelf.put(metrics_of(FACTS, ledger=LEDGER))
    kind, text = scrape(opened.port)
    assert kind.startswith("text/plain; version=0.0.4")
    assert text == TEXT
    kind, text = scrape(opened.port, accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    read = list(parse_openmetrics(text.decode()))  # type: ignore[no-untyped-call]
    assert len(read) == len(families(TEXT))
    shelf.put(metrics_of(replace(FACTS, guests=()), ledger=LEDGER))
    assert values(scrape(opened.port)[1], "vmsnap_guest_snapshots") == {}


def test_clients_that_say_nothing_keep_no_one_else_out_for_long(endpoint: tuple[Endpoint, Shelf]) -> None:
    opened, shelf = endpoint
    shelf.put(metrics_of(FACTS, ledger=LEDGER))
    silent = [socket.create_connection(("127.0.0.1", opened.port)) for _ in range(7)]
    assert scrape(opened.port)[1] == TEXT
    silent += [socket.create_connection(("127.0.0.1", opened.port)) for _ in range(20)]
    for one in silent:
        one.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert scrape(opened.port)[1] == TEXT
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_port_that_is_taken_is_said_so(endpoint: tuple[Endpoint, Shelf]) -> None:
    opened, shelf = endpoint
    with pytest.raises(PreconditionError, match="cannot listen for Prometheus") as caught:
        Endpoint(IPv4Address("127.0.0.1"), port=opened.port, shelf=shelf)
    assert caught.value.remedy


def test_ipv6_can_be_listened_at() -> None:
    opened = Endpoint(IPv6Address("::1"), port=0, shelf=Shelf())
    try:
        with urlopen(f"http://[::1]:{opened.port}/", timeout=10) as answer:
            assert answer.status == 200
    finally:
        opened.close()
