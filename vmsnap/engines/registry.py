"""Which engine a policy asks for."""

from __future__ import annotations

from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.model.policy import DatabasePolicy
from vmsnap.ports.engine import Engine


def engine_for(policy: DatabasePolicy) -> Engine:
    """Return the engine that a policy names, set up as it says."""
    return {"postgresql": PostgreSQL}[policy.engine](clusters=policy.clusters)
