"""Asking ``pg_controldata``, the tool in the guest, for a cluster's state."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from vmsnap.engines.asking import PLAIN_MESSAGES, ask
from vmsnap.errors import GuestCommandError
from vmsnap.model.command import Command, Procedure
from vmsnap.model.drain import Instance

_STATE = "Database cluster state"
_OBSERVED = {
    _STATE: "state",
    "Database system identifier": "system identifier",
    "Latest checkpoint location": "checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class ControlData:
    """What the tool printed. ``doubtful``: it warned, which it does of a damaged file before it prints its guesses."""

    state: str
    observed: tuple[tuple[str, str], ...]
    doubtful: bool


def control_data(instance: Instance) -> Procedure[ControlData]:
    """Run the tool. May be repeated, on a running server as well. Raises GuestCommandError."""
    result = yield from ask(
        Command(
            argv=(
                *PLAIN_MESSAGES,
                posixpath.join(instance.programs, "pg_controldata"),
                *("-D", instance.data_directory),
            ),
            user=instance.user,
        ),
        what=f"cannot read the state of the PostgreSQL server on {instance.data_directory}",
        remedy="if the policy has [[database.clusters]], correct programs, data_directory and user there",
    )
    return parse_control_data(result.text, warnings=result.error_text)


def parse_control_data(text: str, *, warnings: str = "") -> ControlData:
    """Return what the tool printed, and warned of. Raises GuestCommandError for what makes no sense."""
    pairs = (line.partition(":") for line in text.splitlines())
    said = {label.strip(): value.strip() for label, colon, value in pairs if colon}
    if _STATE not in said:
        raise GuestCommandError("the output of pg_controldata makes no sense", details=text[:500])
    return ControlData(
        state=said[_STATE],
        observed=tuple((name, said[label]) for label, name in _OBSERVED.items() if label in said),
        # On stdout in capitals up to PostgreSQL 16, on stderr in small letters since.
        doubtful="warning" in (text + warnings).lower(),
    )
