"""``vmsnap prune``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.calendar import calendar_lines
from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, Session, begin
from vmsnap.cli.documents import forecasts_document, prune_document
from vmsnap.cli.failures import plain_error_lines
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import minute, printable, size
from vmsnap.cli.times import parse_span
from vmsnap.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from vmsnap.model.due import ForecastReport, PruneFailure, PruneReport
    from vmsnap.model.report import PruneDecision


_DOUBT = (
    "This host's clock is far ahead of the newest snapshots: it is wrong, or there were no backups for long. What only such "
    "a clock calls old, or not pinned any more, stays. If the clock is right, add --trust-clock."
)

_UNKNOWN = (
    "The replica cannot be asked which copies it has, so nothing that it might lack was removed here. "
    "'vmsnap doctor' says what is wrong with it."
)


def prune(
    ctx: typer.Context,
    guest: Annotated[
        str | None, typer.Argument(metavar="GUEST", help="Only this guest's snapshots.", autocompletion=complete_guest)
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            "--simulate", metavar="SPAN", help='Draw what would be left after SPAN ("2y") of regular backups.'
        ),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option("--every", metavar="SPAN", help="With --simulate: time between backups. [default: as scheduled]"),
    ] = None,
    trust_clock: Annotated[
        bool, typer.Option("--trust-clock", help="Believe the clock, however far it is from the newest snapshots.")
    ] = False,
    many: Annotated[
        bool, typer.Option("--many", help="Remove even more than half of a guest's snapshots at once.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Remove snapshots that retention does not keep, and say why each one stays or goes.

    Pinned snapshots, those an environment uses, the newest and the newest verified one always stay. Where the clock is far
    ahead of the newest snapshots, nothing goes by age unless --trust-clock is given.

    Where a policy says that more than half of a guest's snapshots shall go at once, and more than five, none goes unless --many
    is given: the policy was changed, and perhaps by mistake. Of several guests, one that fails stops no other.

    Of a guest with copies at the replica, those are decided of too, by [replica.retention]. The last copy of a snapshot goes only
    where the rules of both places let it go. What copies needed at the replica is freed by 'vmsnap gc'.

    --simulate removes nothing. It draws a calendar of what the policy will have kept.

    For example:

        vmsnap prune --dry-run
        vmsnap prune db1
        vmsnap prune db1 --simulate 2y
    """
    session = begin(ctx, json=json, config=config)
    if simulate is not None:
        _simulate(session, guest, simulate=simulate, every=every)
        return
    if every is not None:
        raise ConfigError("--every is given without --simulate", remedy="add --simulate, for example --simulate 2y")
    application = session.application
    with session.unstoppable():
        report = application.prune(guest, dry_run=dry_run, trust_clock=trust_clock, many=many)
    session.show(
        prune_document(report, dry_run=dry_run, now=session.now()),
        human=lambda console: _print(console, report, dry_run=dry_run),
    )
    if report.exit_code is not ExitCode.DONE:
        raise typer.Exit(int(report.exit_code))


def _simulate(session: Session, guest: str | None, *, simulate: str, every: str | None) -> None:
    span = parse_span(simulate, option="--simulate")
    interval = None if every is None else parse_span(every, option="--every")
    report = session.application.forecast(guest, span=span, every=interval)
    session.show(forecasts_document(report), human=lambda console: _draw(console, report))
    if report.exit_code is not ExitCode.DONE:
        raise typer.Exit(int(report.exit_code))


def _draw(console: Console, report: ForecastReport) -> None:
    if not report.forecasts and not report.failures:
        print_lines(console, ["No guest has a policy: nothing to simulate."])
    for number, forecast in enumerate(report.forecasts):
        print_lines(console, [*([""] if number else []), *calendar_lines(forecast)])
    _print_failures(console, report.failures)


def _print(console: Console, report: PruneReport, *, dry_run: bool) -> None:
    _print_decisions(console, report.decisions, dry_run=dry_run)
    _print_failures(console, report.failures)


def _print_failures(console: Console, failures: Sequence[PruneFailure]) -> None:
    for failure in failures:
        lines = plain_error_lines(failure.error)
        told = [line.replace("vmsnap: ", f"{printable(failure.guest)}: ", 1) for line in lines]
        print_lines(console, told)


def _print_decisions(console: Console, decisions: Sequence[PruneDecision], *, dry_run: bool) -> None:
    if not decisions:
        print_lines(console, ["No snapshots: nothing to decide."])
        return
    places = ("WHERE",) if any(decision.place == "replica" for decision in decisions) else ()
    rows = [
        (
            _verdict(decision, dry_run=dry_run),
            *(decision.place.value for _ in places),
            decision.snapshot.manifest.guest,
            decision.snapshot.id,
            minute(decision.snapshot.manifest.captured),
            "; ".join(decision.reasons),
        )
        for decision in decisions
    ]
    print_table(console, header=("", *places, "GUEST", "SNAPSHOT", "WHEN", "WHY"), rows=rows)
    goes = [decision for decision in decisions if not decision.keep]
    freed = sum(decision.removed_bytes or 0 for decision in goes)
    end = "nothing was removed: dry run" if dry_run else f"{size(freed)} freed"
    verb = "would be removed" if dry_run else "removed"
    print_lines(console, [f"{len(decisions) - len(goes)} kept, {len(goes)} {verb}; {end}."])
    if any("clock-in-doubt" in decision.rules for decision in decisions):
        print_lines(console, [_DOUBT])
    if any("replica-unknown" in decision.rules for decision in decisions):
        print_lines(console, [_UNKNOWN])


def _verdict(decision: PruneDecision, *, dry_run: bool) -> str:
    if decision.keep:
        return "keep"
    if decision.removed_bytes is not None:
        return "removed"
    return "remove" if dry_run else "NOT REMOVED"
