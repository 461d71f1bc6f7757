"""Whether a run that no journal here knows is alive all the same: a run of another state directory, or of a lost one."""

from __future__ import annotations

from typing import Protocol

from vmsnap.model.ids import RunId


class Vitals(Protocol):
    """Looks for processes of this host that work on a run."""

    def signs(self, run: RunId, *, guest: str) -> tuple[str, ...]:
        """Return what shows that a run may be alive, or somebody else's to undo, a sentence each. Changes nothing.

        Signs are another process that works on the run, or on its ``guest`` (empty where it is not known), and another
        vmsnap whose journals know the run. Where it could not look everywhere, that is a sign too.
        """
