"""Which engine a policy asks for."""

from __future__ import annotations

from vmsnap.engines.pg_windows import WindowsPostgreSQL
from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.engines.sqlserver import SqlServer
from vmsnap.model.policy import DatabasePolicy
from vmsnap.ports.engine import Engine


def engine_for(policy: DatabasePolicy) -> Engine:
    """Return the engine that a policy names, set up as it says."""
    if policy.engine == "sqlserver":
        return SqlServer()
    if policy.engine == "postgresql-windows":
        return WindowsPostgreSQL()
    return PostgreSQL(clusters=policy.clusters)
