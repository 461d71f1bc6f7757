"""Copies that a timed round cannot send: told as what the daemon's chores fail at is told, and no word that all is well."""

from __future__ import annotations

from pathlib import Path

from tests.unit.listener import listening
from tests.workflow.invocations import backup, simply, succeed
from tests.workflow.test_replica import connected
from vmsnap.bootstrap import Application
from vmsnap.config.policies import PolicyBook
from vmsnap.config.settings import Settings
from vmsnap.model.due import DueReport, Limits
from vmsnap.model.policy import Policy
from vmsnap.oversight import Oversight
from vmsnap.ports.clock import Cancel
from vmsnap.state.alarms import FileAlarmBook
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.world import World


def test_a_copy_that_cannot_be_sent_is_told_and_nobody_hears_that_all_is_well(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup(Policy(guest="db")))
    bucket = MemoryBucket()
    down = FaultyObjects(MemoryObjects(bucket), faults=dict.fromkeys(range(1000), ObjectFault.FAIL_BEFORE))
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "db.toml").write_text('[schedule]\nevery = "1y"\n[replica]\nenabled = true\n')
    policies = PolicyBook(tmp_path / "policies")
    state, textfile = tmp_path / "state", tmp_path / "vmsnap.prom"
    with listening() as heard:
        settings = Settings.model_validate(
            {
                "store": {"path": str(tmp_path / "store")},
                "state": {"path": str(state)},
                "metrics": {"textfile": str(textfile)},
                "notifications": {"dead_man_url": heard.ping_url()},
            }
        )

        def timed(world: World, cancel: Cancel) -> DueReport:
            oversight = Oversight(settings, policies=policies, world=world)
            application = Application(lambda: world, policies=policies, limits=Limits(), oversight=oversight)
            return application.run_due(dry_run=False, progress=QuietProgress(), cancel=cancel)

        connected(lab, down, state=tmp_path / "replica")
        failed = simply(lab, timed).result
        assert isinstance(failed, DueReport)
        assert [entry.error is None for entry in failed.replicated] == [False]
        assert heard.pings == []
        (raised,) = FileAlarmBook(state).load().raised
        assert raised.alarm.about.startswith("chore: replicate"), "of this guest, or of all where the replica is away"
        assert "\nvmsnap_problems 1.0\n" in textfile.read_text()
        assert '\nvmsnap_guest_copies_lacking{guest="db"} 1.0\n' in textfile.read_text()

        connected(lab, MemoryObjects(bucket), state=tmp_path / "replica")
        sent = simply(lab, timed).result
        assert isinstance(sent, DueReport)
        assert [entry.error is None for entry in sent.replicated] == [True]
        assert len(heard.pings) == 1
        assert FileAlarmBook(state).load().raised == ()
        assert '\nvmsnap_guest_copies_lacking{guest="db"} 0.0\n' in textfile.read_text()
