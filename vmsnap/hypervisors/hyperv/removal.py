"""Undoing what a run made on a Hyper-V host: only what bears its tag, or lies in its folder, until it is gone."""

from __future__ import annotations

import logging
from datetime import timedelta

from vmsnap.errors import DeadlineError, DriverError, GuestNotFoundError
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.rows import Machine
from vmsnap.hypervisors.hyperv.tags import Part, Tag, TagKind
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Clock

_LOG = logging.getLogger(__name__)
_BETWEEN = timedelta(seconds=1)
_REMOVABLE = frozenset({"Off", "Saved", "FastSaved", "OffCritical", "SavedCritical"})


class Removal:
    """Removes VMs and folders of runs. Every method may be repeated, and is content with what is gone."""

    def __init__(self, host: Host, *, clock: Clock) -> None:
        self._host = host
        self._clock = clock

    def machines(self, run: RunId, *, kind: TagKind, deadline: timedelta) -> None:
        """End and forget the VMs of a run, and those that an import of it planned and never made.

        What is on its way from one state to another is waited for. Raises DeadlineError with what kept them, DriverError.
        """
        until = self._clock.monotonic() + deadline.total_seconds()
        hindrance: DriverError | None = None
        while True:
            # In this order: what is planned may become real between the two looks, and never the other way round.
            planned = [
                item
                for item in self._host.planned()
                if self._host.folders.run_of(item.folder) == run or item.name == f"vmsnap-clone-{run}"
            ]
            found = self._host.machines_of(run)
            if not found and not planned:
                return
            if self._clock.monotonic() > until:
                names = ", ".join(
                    [f"{machine.name} ({machine.state})" for machine in found] + [i.name for i in planned]
                )
                raise DeadlineError(
                    f"VMs of run {run} could not be removed from the Hyper-V host: {names}",
                    details=None if hindrance is None else hindrance.brief,
                    remedy="'vmsnap reconcile' tries again; the Hyper-V host's event log says what holds them",
                ) from hindrance
            try:
                for machine in found:
                    self._remove(machine, tag=Tag(kind=kind, run=run))
                for item in planned:
                    self._host.remove_planned(item)
            except GuestNotFoundError:
                pass  # somebody else removed it meanwhile
            except DriverError as error:
                _LOG.info("a VM of run %s is not removed yet: %s", run, error.brief)
                hindrance = error
            self._clock.sleep(_BETWEEN)

    def _remove(self, machine: Machine, *, tag: Tag) -> None:
        if machine.state not in _REMOVABLE:
            self._host.turn_off(machine, tag=tag)
        self._host.remove(machine, tag=tag)

    def folder(self, run: RunId, part: Part | None, *, deadline: timedelta) -> None:
        """Remove a part of a run's folder, or all of it; files that Hyper-V still holds are waited for."""
        until = self._clock.monotonic() + deadline.total_seconds()
        while True:
            try:
                self._host.remove_folder(run, part, timeout=deadline)
            except DriverError as error:
                if self._clock.monotonic() > until:
                    raise DeadlineError(
                        f"the folder {self._host.folders.of(run, part)} on the Hyper-V host could not be removed",
                        details=error.brief,
                        remedy="'vmsnap reconcile' tries again; is an export into it, or a merge, still going on?",
                    ) from error
                self._clock.sleep(_BETWEEN)
            else:
                return
