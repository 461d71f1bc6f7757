"""Hints of what changed since the snapshot before: begun before a capture, read after it, kept where a snapshot came of it.

They only save reading. So whatever goes wrong with them is told, everything is read, and the backup goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmsnap.errors import CancelledError, VmsnapError
from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Finding, Guest, Severity
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import SnapshotId
from vmsnap.model.journal import Resource
from vmsnap.model.manifest import DiskRecord, Snapshot
from vmsnap.model.policy import Policy
from vmsnap.workflow.run import Run, as_vmsnap_error
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_OFF = "the policy says so: capture.hints is off"
_NO_SNAPSHOT = "there is no earlier snapshot"
_TRUST_AGAIN = (
    'find out what writes to the disk past its QEMU; to trust hints again, back up once with capture.hints = "off", '
    'and set it to "auto" again'
)


class Hinting:
    """The hints of one run. Call ``begin``, ``read`` and ``keep`` once each, in this order; none of them fails."""

    def __init__(
        self, world: World, *, run: Run, plan: CapturePlan, policy: Policy, warn: Callable[[str], None]
    ) -> None:
        self._world = world
        self._run = run
        self._plan = plan
        self._policy = policy
        self._warn = warn
        self._hints = world.hints
        self._resource: Resource | None = None
        self._begun = False
        self._reason = _NO_SNAPSHOT
        self._found: dict[str, DiskHint] = {}

    def begin(self) -> None:
        """Begin notes for the next backup, before the capture."""
        if self._policy.capture.hints == "off":
            with self._contained("end notes of what the guest writes"):
                self._hints.keep(self._plan.guest, run=None)
            return
        with self._contained("name notes of what the guest writes"):
            self._resource = self._hints.resource(self._plan)
        if self._resource is not None:
            self._run.acquire(self._resource, self._begin)

    def _begin(self) -> None:
        with self._contained("begin notes of what the guest writes"):
            self._hints.begin(self._plan)
            self._begun = True

    def read(self) -> None:
        """Read what the guest wrote up to the capture, after it. What it wrote since then may be told as well."""
        snapshots = self._world.store.snapshots(self._plan.guest.name)
        distrusted = distrust_of(snapshots)
        if self._policy.capture.hints == "off":
            self._reason = _OFF
        elif distrusted is not None:
            self._reason = f"hints are not believed: {distrusted}"
        elif snapshots:
            self._reason = "the notes could not be read"
            with self._contained("read the notes of what the guest wrote"):
                # A newer snapshot that is passed over when this one is stored makes the hint useless, not wrong.
                hints = self._hints.read(self._plan, since=snapshots[-1].id)
                self._found = {hint.target: hint for hint in hints}

    def for_disk(self, target: str) -> DiskHint:
        """Return the hint of one disk."""
        return self._found.get(target, DiskHint(target=target, reason=self._reason))

    def verdict(self, disks: tuple[DiskRecord, ...]) -> str | None:
        """Tell what was found to be wrong with hints, by this run or before; None: nothing."""
        found = [
            f"disk {disk.target}: {disk.read.mismatch}, which the hint called unchanged (seen by run {self._run.id})"
            for disk in disks
            if disk.read is not None and disk.read.mismatch is not None
        ]
        if found:
            self._warn(f"a hint of what changed was wrong, and everything was read: {found[0]}. {_TRUST_AGAIN}")
            return found[0]
        if self._policy.capture.hints == "off":
            return None
        return distrust_of(self._world.store.snapshots(self._plan.guest.name))

    def keep(self) -> None:
        """Let the notes go on until the next backup: the run became a snapshot. All others end."""
        kept = False
        with self._contained("keep the notes of what the guest writes"):
            if self._begun:
                self._hints.keep(self._plan.guest, run=self._plan.run)
                kept = True
        if kept and self._resource is not None:
            self._run.hand_over(self._resource)

    @contextmanager
    def _contained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - not even a bug there is worth a backup
            told = as_vmsnap_error(error, doing=doing)
            _LOG.info("could not %s: %s", doing, told.brief, exc_info=told is not error)
            self._reason = f"could not {doing}: {told.brief}"


def distrust_of(snapshots: tuple[Snapshot, ...]) -> str | None:
    """Return why the hints of a guest are not believed any more, by its newest snapshot; None while they are."""
    return snapshots[-1].hints_distrusted if snapshots else None


def hint_findings(world: World, *, policy: Policy, guest: Guest) -> tuple[Finding, ...]:
    """Say whether the next backup of a guest will read only what changed. Changes nothing."""
    try:
        return (_finding(world, policy=policy, guest=guest),)
    except VmsnapError as error:
        return (_everything(error.brief),)


def _finding(world: World, *, policy: Policy, guest: Guest) -> Finding:
    snapshots = world.store.snapshots(guest.name)
    distrusted = distrust_of(snapshots)
    if policy.capture.hints == "off":
        return _everything(_OFF)
    if distrusted is not None:
        return Finding(
            check="hints",
            severity=Severity.WARNING,
            message=f"a hint of what changed was wrong, so backups read everything: {distrusted}",
            remedy=_TRUST_AGAIN,
        )
    if not snapshots:
        return _everything(_NO_SNAPSHOT)
    newest: SnapshotId = snapshots[-1].id
    if newest not in world.hints.known_since(guest):
        return _everything(f"nothing is known of the guest's writes since snapshot {newest}")
    message = f"the next backup reads only what changed since snapshot {newest}"
    return Finding(check="hints", severity=Severity.OK, message=message)


def _everything(reason: str) -> Finding:
    return Finding(check="hints", severity=Severity.OK, message=f"the next backup reads everything: {reason}")
