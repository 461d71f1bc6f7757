"""The responder: a VM of the operator's with one adapter and a DHCP server, for clones that are to have an address.

It is named in the settings (``hyperv.responder_vm``), and its notes say so too. It is on a run's private switch only while the
run's ladder is climbed: the fence is proven without it before, and read back without it afterwards. A VM with one adapter
is on one switch at a time, so it leads nowhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from vmsnap.errors import BugError, DeadlineError, DriverError, PreconditionError, UnknownOutcomeError, VmsnapError
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.rows import Machine, Plug, Switch
from vmsnap.hypervisors.hyperv.tags import RESPONDER, Tag, TagKind, read_tag
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_BETWEEN = timedelta(seconds=1)
_REMEDY = "see 'Addresses' in docs/hyper-v.md for what the VM of hyperv.responder_vm has to be"


class Responder:
    """The one VM that may share a clone's private switch for a while. Safe to share between runs."""

    def __init__(self, host: Host, *, name: str, clock: Clock) -> None:
        self._host = host
        self._name = name
        self._clock = clock
        self._admitted: dict[RunId, str] = {}
        self._lock = threading.Lock()

    def require_ready(self) -> tuple[Machine, Plug]:
        """Return the VM and its adapter where it is what it has to be. Changes nothing. Raises PreconditionError."""
        named = [machine for machine in self._host.machines() if machine.name == self._name]
        if len(named) != 1:
            raise PreconditionError(f"the Hyper-V host has {len(named)} VMs called {self._name!r}", remedy=_REMEDY)
        (machine,) = named
        plugs = _plugs_of(self._host, machine)
        wrong = []
        if not machine.notes.startswith(RESPONDER.beginning):
            wrong.append(f"its notes do not begin with '{RESPONDER.beginning}'")
        if machine.state != "Running":
            wrong.append(f"it is {machine.state}")
        if len(plugs) != 1:
            wrong.append(f"it has {len(plugs)} network adapters instead of one")
        if self._host.describe(machine.id).devices:
            wrong.append("a device of the host is assigned to it")
        ours = {switch.id.lower() for switch in self._host.switches() if _is_fence(switch)}
        wrong += [f"it is on the switch {plug.switch}" for plug in plugs if _is_elsewhere(plug, ours)]
        if wrong:
            raise PreconditionError(
                f"{self._name!r} cannot be a clone's responder: {wrong[0]}", details="\n".join(wrong), remedy=_REMEDY
            )
        return machine, plugs[0]

    def admitted(self, run: RunId) -> str | None:
        """Return the id of the VM while it may be on the switch of that run's fence."""
        return self._admitted.get(run)

    @contextmanager
    def on(self, switch: Switch, *, run: RunId, patience: timedelta, cancel: Cancel) -> Iterator[None]:
        """Have the responder on the private switch of a run's fence, and nobody there again afterwards.

        ``patience``: how long another run may have it still. Raises DeadlineError, PreconditionError, DriverError.
        """
        machine = self._take(switch, run=run, patience=patience, cancel=cancel)
        try:
            yield
        except BaseException:
            self._give_up(machine, switch=switch, run=run)
            raise
        self._let_go(machine, switch=switch, run=run)

    def _take(self, switch: Switch, *, run: RunId, patience: timedelta, cancel: Cancel) -> Machine:
        until = self._clock.monotonic() + patience.total_seconds()
        while True:
            cancel.check()
            with self._lock:
                machine, plug = self.require_ready()
                if not plug.switch:
                    self._connect(machine, plug, switch=switch, run=run)
                    return machine
            if self._clock.monotonic() > until:
                raise DeadlineError(
                    f"the responder {self._name!r} is on {plug.switch} for another run",
                    remedy="let runs that need it follow each other; where none goes on, run 'vmsnap reconcile'",
                )
            self._clock.sleep(_BETWEEN)

    def _connect(self, machine: Machine, plug: Plug, *, switch: Switch, run: RunId) -> None:
        # Whoever watches the switch has to know before it is there.
        self._admitted[run] = machine.id.lower()
        try:
            self._plug(machine, plug, switch=switch, run=run)
        except BaseException:
            self._give_up(machine, switch=switch, run=run)
            raise

    def _plug(self, machine: Machine, plug: Plug, *, switch: Switch, run: RunId) -> None:
        tag = Tag(kind=TagKind.FENCE, run=run)
        try:
            self._host.connect(machine.id, tag=RESPONDER, switch=switch, switch_tag=tag, macs=[plug.mac])
        except UnknownOutcomeError:
            _LOG.info("no answer to putting the responder on %s; it is looked for", switch.name)
        if not _is_on(self._host, machine, switch=switch):
            raise DriverError(f"the responder {self._name!r} is not on {switch.name}", remedy=_REMEDY)

    def _give_up(self, machine: Machine, *, switch: Switch, run: RunId) -> None:
        try:
            self._let_go(machine, switch=switch, run=run)
        except VmsnapError as error:
            _LOG.warning("the responder stays on %s until the fence is released: %s", switch.name, error.brief)

    def _let_go(self, machine: Machine, *, switch: Switch, run: RunId) -> None:
        try:
            unplug_responders(self._host, switch=switch)
            if _is_on(self._host, machine, switch=switch):
                raise DriverError(
                    f"the responder {self._name!r} stays on {switch.name}", remedy="run 'vmsnap reconcile'"
                )
        finally:
            self._admitted.pop(run, None)


def unplug_responders(host: Host, *, switch: Switch) -> None:
    """Take every VM that is a responder by its notes off a private switch of ours. May be repeated."""
    tag = read_tag(switch.notes)
    if tag is None or tag.kind is not TagKind.FENCE:
        raise BugError(f"{switch.name!r} is not vmsnap's switch")
    responders = {machine.id.lower() for machine in host.machines() if machine.notes.startswith(RESPONDER.beginning)}
    if not responders:
        return
    for plug in host.plugs():
        if plug.switch_id.lower() == switch.id.lower() and plug.machine_id.lower() in responders:
            try:
                host.disconnect(plug.machine_id, tag=RESPONDER, macs=[plug.mac])
            except UnknownOutcomeError:
                _LOG.info("no answer to taking the responder off %s", switch.name)


def _plugs_of(host: Host, machine: Machine) -> list[Plug]:
    return [plug for plug in host.plugs() if not plug.of_host and plug.machine_id.lower() == machine.id.lower()]


def _is_on(host: Host, machine: Machine, *, switch: Switch) -> bool:
    return any(plug.switch_id.lower() == switch.id.lower() for plug in _plugs_of(host, machine))


def _is_fence(switch: Switch) -> bool:
    tag = read_tag(switch.notes)
    return tag is not None and tag.kind is TagKind.FENCE and switch.kind == "Private"


def _is_elsewhere(plug: Plug, ours: set[str]) -> bool:
    return bool(plug.switch) and plug.switch_id.lower() not in ours
