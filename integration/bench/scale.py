"""Five hundred policies and twenty thousand snapshots: how long it takes to list, to decide what to prune, to look what is due.

Twice: over the fakes, which shows what vmsnap itself costs, and over a store of real manifests and a state directory in files.
``first`` figures are of a process that has just begun and has read nothing yet; the others are of one that goes on, as the
daemon does. Files are in the page cache in both cases. What is timed is what the commands do, printing included.
"""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median

from rich.console import Console

from integration.lab.lab import Lab
from vmsnap.cli.documents import list_document, prune_document
from vmsnap.cli.failures import print_json
from vmsnap.model.alarms import Ledger, Rules, settle
from vmsnap.model.due import Limits, PruneReport
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.manifest import Manifest, Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport, PruneDecision
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule_policy import SchedulePolicy
from vmsnap.monitoring.exposition import text_of
from vmsnap.monitoring.metrics import metrics_of
from vmsnap.state.attempts import FileAttemptBook
from vmsnap.stores.images import ImagesStore
from vmsnap.stores.layout import MANIFEST, Layout
from vmsnap.testing.faults import FaultCancel
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.due import DueRuns
from vmsnap.workflow.facts import Stock, gather
from vmsnap.workflow.prune import prune
from vmsnap.workflow.world import World

POLICIES = 500
SNAPSHOTS_OF_EACH = 40
ROUNDS = 3
TICKS = 7
TICKS_FOR_GROWTH = 50
_MEMORY = Path("/dev/shm")
_SCHEDULES = (
    SchedulePolicy(every=timedelta(hours=6)),
    SchedulePolicy(at=("02:00", "14:30"), jitter=timedelta(minutes=30)),
    SchedulePolicy(calendar=("Mon..Fri *-*-* 01:15",), windows=("Mon..Fri 00:00-06:00",), blackouts=("*-12-24..26",)),
    SchedulePolicy(every=timedelta(days=1), windows=("22:00-05:00",), jitter=timedelta(hours=1)),
)
_RETENTION = RetentionPolicy(keep_last=6, keep_hourly=12, keep_daily=14, keep_weekly=8, keep_monthly=12, keep_yearly=3)


def measure(lab: Lab | None, console: Console) -> dict[str, object]:
    """Return the figures. Takes half a minute; the lab is not used."""
    del lab
    policies = [_policy(number) for number in range(POLICIES)]
    with (
        tempfile.TemporaryDirectory(prefix="vmsnap-scale-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder,
        _quiet(),
    ):
        fake = FakeWorld(Path(folder) / "fake")
        template = _template(fake)
        snapshots = [one for policy in policies for one in _snapshots(policy.guest, template=template, fake=fake)]
        for one in snapshots:
            fake.store.put(one)
        world = fake.process()
        figures: dict[str, object] = {"policies": len(policies), "snapshots": len(snapshots)}
        console.print(f"{len(policies)} policies, {len(snapshots)} snapshots")
        figures |= {
            "list_s": _best(lambda: _list(world)),
            "prune_s": _best(lambda: _prune(world, policies)),
            "tick_ms": _tick_ms(world, policies),
            "rss_growth_bytes": _growth(world, policies),
        }
        root, state = Path(folder) / "store", Path(folder) / "state"
        _write(root, snapshots)
        files = replace(world, store=ImagesStore(root, allow_copies=True), attempts=FileAttemptBook(state))
        figures |= {
            "files_first_tick_ms": _timed(lambda: _tick(files, policies)) * 1000,
            "files_tick_ms": _tick_ms(files, policies),
            **_look_ms(files, policies),
            "files_prune_s": _best(lambda: _prune(files, policies)),
            "files_list_s": _best(lambda: _list(files)),
            "files_rss_growth_bytes": _growth(files, policies),
            "files_first_list_s": _first_list_s(root),
        }
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}


def _look_ms(world: World, policies: Sequence[Policy]) -> dict[str, object]:
    """Return how long a look for alarms and metrics takes: the first, and one of those after it."""
    stock = Stock(world)

    def look() -> None:
        facts = gather(world, policies=policies, ledger=Ledger(), stock=stock, room=lambda: None)
        ledger, _ = settle(Ledger(), facts=facts, rules=Rules())
        text_of(metrics_of(facts, ledger=ledger))

    first = _timed(look) * 1000
    return {"files_first_look_ms": first, "files_look_ms": median(_timed(look) for _ in range(TICKS)) * 1000}


def _policy(number: int) -> Policy:
    zone = ("UTC", "Europe/Berlin", "America/New_York")[number % 3]
    return Policy(
        guest=f"guest{number:03}", schedule=_SCHEDULES[number % len(_SCHEDULES)], retention=_RETENTION, time_zone=zone
    )


def _template(fake: FakeWorld) -> Manifest:
    """Return the manifest of a real run over fakes, so that its size is that of a manifest."""
    made = Backup(fake.process(), policy=Policy(guest="db"), progress=QuietProgress(), cancel=FaultCancel()).run()
    return fake.store.find(made.snapshot).manifest


def _snapshots(guest: str, *, template: Manifest, fake: FakeWorld) -> Iterator[Snapshot]:
    """Yield a guest's snapshots, one each seven hours up to now."""
    now = fake.clock.now()
    for number in range(SNAPSHOTS_OF_EACH):
        identity = f"{int(guest.removeprefix('guest')) * 1000 + number + 0x100000:010x}"
        captured = now - timedelta(hours=7 * (SNAPSHOTS_OF_EACH - number) - 6)
        yield Snapshot(
            manifest=template.model_copy(
                update={
                    "id": SnapshotId(identity),
                    "run": RunId(identity),
                    "guest": guest,
                    "created": captured + timedelta(minutes=2),
                    "capture": template.capture.model_copy(update={"captured": captured}),
                }
            )
        )


def _write(root: Path, snapshots: Sequence[Snapshot]) -> None:
    layout = Layout(root=root)
    for one in snapshots:
        folder = layout.snapshot(one.manifest.guest, snapshot=one.id)
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(one.manifest.model_dump_json(indent=2) + "\n", encoding="ascii")
    # What has just changed is not remembered: it might change again within the clock's grain.
    time.sleep(3)


def _list(world: World) -> None:
    print_json(list_document(world.store.snapshots(), now=world.clock.now()), stream=io.StringIO())


def _prune(world: World, policies: Sequence[Policy]) -> None:
    decisions: list[PruneDecision] = []
    for policy in policies:
        decisions += prune(world, policy=policy, dry_run=True)
    document = prune_document(PruneReport(decisions=tuple(decisions)), dry_run=True, now=world.clock.now())
    print_json(document, stream=io.StringIO())


def _tick(world: World, policies: Sequence[Policy]) -> None:
    def back_up(_: Policy) -> BackupReport:
        raise AssertionError

    runs = DueRuns(
        world, policies=policies, limits=Limits(), back_up=back_up, progress=QuietProgress(), cancel=FaultCancel()
    )
    waiting, entries = runs.look()
    assert len(waiting) + len(entries) == len(policies)


def _tick_ms(world: World, policies: Sequence[Policy]) -> float:
    return median(_timed(lambda: _tick(world, policies)) * 1000 for _ in range(TICKS))


def _best(work: Callable[[], object]) -> float:
    """Return the shortest of a few times: what else the machine does only ever adds to it."""
    return min(_timed(work) for _ in range(ROUNDS))


def _growth(world: World, policies: Sequence[Policy]) -> int:
    for _ in range(TICKS):
        _tick(world, policies)
    before = _rss_bytes()
    for _ in range(TICKS_FOR_GROWTH):
        _tick(world, policies)
    return max(0, _rss_bytes() - before)


def _first_list_s(root: Path) -> float:
    """Time ``list`` in a process of its own, from the first module it loads."""
    code = (
        "import io, sys\n"
        "from datetime import UTC, datetime\n"
        "from pathlib import Path\n"
        "from vmsnap.cli.documents import list_document\n"
        "from vmsnap.cli.failures import print_json\n"
        "from vmsnap.stores.images import ImagesStore\n"
        "found = ImagesStore(Path(sys.argv[1])).snapshots()\n"
        "print_json(list_document(found, now=datetime.now(UTC)), stream=io.StringIO())\n"
    )
    return _timed(lambda: subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=120))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("vmsnap")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)
