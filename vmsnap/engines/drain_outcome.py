"""What a drain's script reports in one line, whichever database it is."""

from __future__ import annotations

import logging

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vmsnap.errors import GuestCommandError
from vmsnap.model.command import CommandResult
from vmsnap.model.drain import DrainReport, Instance

OPENED = "vmsnap-drain opened"
RESULT = "vmsnap-drain result "
_log = logging.getLogger(__name__)


class Outcome(BaseModel):
    """The numbers, as the script counted them. ``prepared``: transactions that stay prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    in_flight: int = Field(ge=0)
    finished: int = Field(ge=0)
    rolled_back: int = Field(ge=0)
    prepared: int = Field(ge=0)
    seconds: float = Field(ge=0)


def parse_outcome(result: CommandResult) -> Outcome:
    """Return what the script reported. Raises GuestCommandError for anything but one line whose numbers add up."""
    lines = [line[len(RESULT) :] for line in result.text.splitlines() if line.startswith(RESULT)]
    try:
        (line,) = lines
        outcome = Outcome.model_validate_json(line)
    except ValueError as error:
        problem = "not one result line" if not isinstance(error, ValidationError) else str(error)
        raise GuestCommandError(
            "the drain's answer makes no sense", details=f"{problem}\n{result.text[-500:]}"
        ) from error
    if outcome.in_flight != outcome.finished + outcome.rolled_back:
        raise GuestCommandError("the drain's numbers do not add up", details=lines[0])
    return outcome


def report_of(instance: Instance, *, result: CommandResult) -> DrainReport:
    """Return the report of a drain; prepared transactions are only logged. Raises what ``parse_outcome`` raises."""
    outcome = parse_outcome(result)
    if outcome.prepared:
        _log.warning(
            "%s holds %d prepared transactions: they stay prepared in the snapshot", instance.name, outcome.prepared
        )
    return DrainReport(
        engine=instance.engine,
        instance=instance.name,
        in_flight_at_start=outcome.in_flight,
        finished=outcome.finished,
        rolled_back=outcome.rolled_back,
        seconds=outcome.seconds,
    )
