"""What only a running clone can show: that it, and not the original, answers, and that the original is well.

Never an address alone: a routing error would reach the original, which has the same address, host key and memory. Who
answers is told by

- the agent: its line is a socket of the clone's own process, by the clone's name at the hypervisor. A token written
  through it into the clone's memory (``workflow.signs``), never part of a snapshot, is read back over the line that is
  used, and the original does not have it. PowerShell Direct is such a line too: the host's own, by the clone's id;
- SSH where the clone's agent answers too: the token comes in by the agent and must be read back over SSH;
- SSH alone: its connections are opened inside the fence's namespace, whose only way leads to the clone's tap (read
  back, and watched). A quarter of a megabyte asked for over the connection must be counted at that tap. The host key,
  pinned, says that it is the guest or its copy; the tap says which.

The boot id says besides that the clone is a copy of the original as it runs. A clone that booted has one of its own.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from vmsnap.errors import BugError, GuestCommandError, GuestUnreachableError, IsolationError
from vmsnap.model.capture import Clone
from vmsnap.model.command import Command
from vmsnap.model.guest import Guest, GuestState
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import WHILE_IT_RUNS, IsolationEvidence, ProofKind, ProofPoint
from vmsnap.ports.guest import GuestControl
from vmsnap.ports.network import FenceWatch
from vmsnap.workflow.run import closing
from vmsnap.workflow.signs import BOOT_ID, Signs, signs_of
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_COMMAND_TIMEOUT = timedelta(seconds=60)
_ASKING_TIMEOUT = timedelta(seconds=10)
_PROBE_TIMEOUT = timedelta(seconds=3)
_ASKINGS = 3
_VOLUME_BYTES = 256 << 10
_REMEDY = "nothing was stored; look at the clone's network and the original before the next run"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The original as it was before the capture. ``boot_id`` is None where nobody could tell it without a login."""

    guest: Guest
    by_agent: bool
    boot_id: str | None


def know(world: World, *, guest: Guest, by_agent: bool) -> Source:
    """Look at the original before it is captured. No program is run in it: its agent reads one file of the kernel's."""
    boot_id = None
    if by_agent:
        try:
            data = world.access.read_file(world.hypervisor.agent(guest.name), path=BOOT_ID, timeout=_ASKING_TIMEOUT)
            boot_id = None if data is None else data.decode("ascii", "replace").strip()
        except (GuestCommandError, GuestUnreachableError) as error:
            _LOG.info("the boot id of %r cannot be read: %s", guest.name, error.brief)
    return Source(guest=guest, by_agent=by_agent, boot_id=boot_id)


def identify(
    world: World, *, source: Source, clone: Clone, control: GuestControl, watch: FenceWatch, booted: bool
) -> IsolationEvidence:
    """Make sure who is who before any work is drained. ``booted``: the clone did not inherit the original's memory.

    Raises IsolationError, GuestUnreachableError, DriverError.
    """
    token = secrets.token_hex(16)
    signs = signs_of(control.method, run=clone.run, token=token)
    points = (
        *_by_token(world, clone=clone, control=control, signs=signs, token=token),
        *(_by_volume(clone.run, control=control, watch=watch) if control.method == "ssh" else ()),
        _boot_point(source, control=control, signs=signs, booted=booted),
        *_original_points(world, source=source, signs=signs),
        *watch.original(),
        *watch.observed(),
    )
    missing = WHILE_IT_RUNS - {point.kind for point in points}
    if missing:
        raise BugError(f"the evidence of isolation says nothing of: {', '.join(sorted(missing))}")
    return IsolationEvidence(run=clone.run, made=world.clock.now(), points=points)


def _by_token(world: World, *, clone: Clone, control: GuestControl, signs: Signs, token: str) -> Iterator[ProofPoint]:
    if control.method != "ssh":
        _write(control, signs=signs)
    elif not _written_by_agent(world, clone=clone, signs=signs):
        return
    found = control.run(signs.read, timeout=_COMMAND_TIMEOUT)
    if found.text.strip() != token:
        raise IsolationError(
            f"what answers by {control.method} is not the clone: it does not have the token that the clone was given",
            details=found.error_text.strip(),
            remedy=_REMEDY,
        )
    yield _identity(
        "token", observed=f"written by the hypervisor's line of {clone.name} itself, read back by {control.method}"
    )


def _write(control: GuestControl, *, signs: Signs) -> None:
    written = control.run(signs.write, timeout=_COMMAND_TIMEOUT)
    if written.exit_status != 0:
        raise IsolationError(
            f"the clone cannot be told from the original: {signs.place} cannot be written in it",
            details=written.error_text.strip(),
            remedy="a Linux guest needs a writable /run, a Windows guest an administrator's account",
        )


def _written_by_agent(world: World, *, clone: Clone, signs: Signs) -> bool:
    """Write the token through the clone's agent where it has one that answers and obeys."""
    agent = world.access.agent(world.hypervisor.agent(clone.name))
    with closing(agent):
        try:
            agent.ping(timeout=_PROBE_TIMEOUT)
            _write(agent, signs=signs)
        except (GuestCommandError, GuestUnreachableError) as error:
            _LOG.info("the clone's agent takes no token: %s", error.brief)
            return False
    return True


def _by_volume(run: RunId, *, control: GuestControl, watch: FenceWatch) -> Iterator[ProofPoint]:
    before = watch.passed_bytes()
    said = control.run(Command(argv=("head", "-c", str(_VOLUME_BYTES), "/dev/urandom")), timeout=_COMMAND_TIMEOUT)
    passed = watch.passed_bytes() - before
    if len(said.stdout) != _VOLUME_BYTES or passed < _VOLUME_BYTES:
        raise IsolationError(
            f"what answers by {control.method} is not the clone: of {len(said.stdout)} bytes that it sent, "
            f"{passed} came by the clone's tap",
            details=said.error_text.strip(),
            remedy=_REMEDY,
        )
    yield _identity(
        f"connection by {control.method}",
        observed=f"opened inside the namespace vmsnap-{run} to the pinned host key; of an answer of {_VOLUME_BYTES} "
        f"bytes, {passed} were counted at the clone's tap",
    )


def _boot_point(source: Source, *, control: GuestControl, signs: Signs, booted: bool) -> ProofPoint:
    found = control.run(signs.boot, timeout=_COMMAND_TIMEOUT)
    boot_id = found.text.strip()
    if source.boot_id is None:
        return _identity("boot id", observed=f"{boot_id or 'none'} in the clone; the original's could not be read")
    if booted:
        if not boot_id or boot_id == source.boot_id:
            raise IsolationError(
                f"what answers by {control.method} is not the clone: it booted, and yet its boot id is "
                f"{boot_id or 'unknown'}, the original's {source.boot_id}",
                remedy=_REMEDY,
            )
        return _identity("boot id", observed=f"{boot_id}, its own; the original's is {source.boot_id}")
    if boot_id != source.boot_id:
        raise IsolationError(
            f"what answers by {control.method} is no copy of the original as it runs: its boot id is "
            f"{boot_id or 'unknown'}, not {source.boot_id}",
            remedy="the original was started anew during the run, or something else answers; back up again",
        )
    return _identity("boot id", observed=f"{boot_id}, as the original's before the capture")


def _original_points(world: World, *, source: Source, signs: Signs) -> Iterator[ProofPoint]:
    name = source.guest.name
    now = world.hypervisor.inspect(name)
    if now.state is not GuestState.RUNNING:
        raise IsolationError(f"the original, {name!r}, does not run any more: it is {now.state}", remedy=_REMEDY)
    yield _original(f"state of {name}", observed=now.state.value)
    for before, after in zip(source.guest.nics, now.nics, strict=False):
        if not before.addresses or not after.addresses:
            continue
        kept = sorted({str(item.ip) for item in before.addresses} & {str(item.ip) for item in after.addresses})
        if not kept:
            raise IsolationError(
                f"the original's NIC {before.mac} has lost its address {before.addresses[0].ip}",
                details=f"it has {', '.join(str(item.ip) for item in after.addresses)} now",
                remedy=_REMEDY,
            )
        yield _original(f"address of {before.mac}", observed=f"{', '.join(kept)}, as before")
    if source.by_agent:
        yield from _original_by_agent(world, source=source, signs=signs)


def _original_by_agent(world: World, *, source: Source, signs: Signs) -> Iterator[ProofPoint]:
    name = source.guest.name
    channel = world.hypervisor.agent(name)
    with closing(world.access.agent(channel)) as agent:
        for asking in range(_ASKINGS):
            try:
                agent.ping(timeout=_ASKING_TIMEOUT)
                break
            except GuestUnreachableError as error:
                if asking + 1 == _ASKINGS:
                    raise IsolationError(
                        f"the original, {name!r}, does not answer by its agent any more",
                        details=error.brief,
                        remedy=_REMEDY,
                    ) from error
    yield _original(f"agent of {name}", observed="answers")
    try:
        there = world.access.read_file(channel, path=signs.place, timeout=_ASKING_TIMEOUT)
    except (GuestCommandError, GuestUnreachableError) as error:
        yield _identity("token in the original", observed=f"not asked for: {error.brief}")
        return
    if there is not None:
        raise IsolationError("the token for the clone is in the original", remedy=_REMEDY)
    yield _identity("token in the original", observed="is not there")


def _identity(name: str, *, observed: str) -> ProofPoint:
    return ProofPoint(kind=ProofKind.IDENTITY, name=name, observed=observed)


def _original(name: str, *, observed: str) -> ProofPoint:
    return ProofPoint(kind=ProofKind.ORIGINAL, name=name, observed=observed)
