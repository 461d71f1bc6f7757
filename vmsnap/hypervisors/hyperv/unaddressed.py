"""What nobody does on Hyper-V: make the inside of a fence a network of vmsnap's own. Nothing of ours is on a private switch."""

from __future__ import annotations

from vmsnap.errors import PreconditionError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import FencePlan
from vmsnap.ports.service import Place, Residence


class NoResidences:
    """Refuses to make the inside of a fence the network that a VM knew."""

    def open(self, plan: FencePlan, *, places: tuple[Place, ...]) -> Residence:
        """Raise PreconditionError."""
        del places
        raise PreconditionError(
            f"a test VM on the private switch {plan.namespace} cannot be reached from here",
            remedy="provision it with --network and a switch of the Hyper-V host, or use its console there",
        )

    def find(self, plan: FencePlan, *, old: OldAddress) -> str | None:
        """Return None: nobody can ask on the switch."""
        del plan, old
        return None
