"""Owners of outside things: who can remove what a run made, even after the run's process died."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

from vmsnap.model.journal import Resource, ResourceKind


class Owner(Protocol):
    """Removes resources of certain kinds, from nothing but their journal entry or their own tags."""

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove the resource, or return at once where it was never made, was half made, or is gone already.

        May be repeated. Raises DriverError or DeadlineError where it could not be removed.
        """

    def owned(self) -> tuple[Resource, ...]:
        """Return what exists now and bears a run's tag, whether or not a journal knows it."""
