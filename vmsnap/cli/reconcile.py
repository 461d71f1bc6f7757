"""``vmsnap reconcile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import reconcile_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, printable
from vmsnap.errors import ConfigError, ExitCode
from vmsnap.model.ids import RunId, is_run_id

if TYPE_CHECKING:
    from vmsnap.model.report import Adoption, ReconcileReport, UnknownRun


def reconcile(
    ctx: typer.Context,
    *,
    adopt: Annotated[
        list[str] | None,
        typer.Option(
            "--adopt", metavar="RUN", help="Undo this run too, which no journal here knows. May be given several times."
        ),
    ] = None,
    destroy_test_vms: Annotated[
        bool, typer.Option("--destroy-test-vms", help="With --adopt: test VMs are meant too, and are destroyed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --adopt: look whether it can be done and say what, and do nothing.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Undo what dead runs left: clones, overlays, fences, memory images, staging folders. Exit code 8 if any is left.

    Only things that bear the id of a run that is over are touched. A source found on an overlay is put back on its own
    disk, nothing lost. Safe to repeat, and done by itself before every run.

    What bears the id of a run that no journal here knows is listed and left alone: it may belong to another vmsnap. Where the
    state directory was lost, --adopt undoes it. A run that may be alive is refused, and so is a test VM.

    For example:

        vmsnap reconcile
        vmsnap reconcile --json | jq .complete
        vmsnap reconcile --adopt 3f1c9e02ab --dry-run
    """
    session = begin(ctx, json=json, config=config)
    adoption = _adoption(adopt or [], destroy_test_vms=destroy_test_vms, dry_run=dry_run)
    application = session.application
    with session.unstoppable():
        report = application.reconcile(adoption)
    session.show(reconcile_document(report), human=lambda console: _print(console, report))
    if not report.complete:
        raise typer.Exit(int(ExitCode.CLEANUP))


def _adoption(runs: list[str], *, destroy_test_vms: bool, dry_run: bool) -> Adoption | None:
    if not runs:
        if destroy_test_vms or dry_run:
            raise ConfigError(
                "--dry-run and --destroy-test-vms say how to adopt, and no run to adopt is named",
                remedy="vmsnap reconcile --adopt RUN --dry-run; 'vmsnap reconcile' lists the runs that can be",
            )
        return None
    for run in runs:
        if not is_run_id(run):
            raise ConfigError(
                f"--adopt {printable(run)!r} is no run's id: ten hexadecimal digits, in lower case",
                remedy="'vmsnap reconcile' lists the runs that can be adopted",
            )
    # Loaded here: --help needs none of it.
    from vmsnap.model.report import Adoption  # noqa: PLC0415

    return Adoption(
        runs=tuple(RunId(run) for run in dict.fromkeys(runs)), destroy_test_vms=destroy_test_vms, dry_run=dry_run
    )


def _print(console: Console, report: ReconcileReport) -> None:
    print_lines(console, [*_done(report), *_unknown(report.unknown)])


def _done(report: ReconcileReport) -> list[str]:
    if report.dry_run:
        lines = ["Would be undone, in this order (dry run: nothing was done):"]
        for run in report.adopted:
            lines += _things(run)
        return lines
    if not report.runs and not report.undone:
        return ["Nothing to undo: no run left anything."]
    lines = []
    for item in report.undone:
        thing = f"{item.kind.value} {printable(item.name)} (run {item.run}, guest {printable(item.guest)})"
        lines.append(f"  undone  {thing}" if item.failure is None else f"  LEFT    {thing}: {printable(item.failure)}")
    left = sum(item.failure is not None for item in report.undone)
    undone = count(len(report.undone) - left, thing="thing")
    lines.append(f"{count(len(report.runs), thing='dead run')}, {undone} undone, {left} left.")
    if left:
        lines.append("What to do: remove the reason given above, then run 'vmsnap reconcile' again.")
    return lines


def _unknown(runs: tuple[UnknownRun, ...]) -> list[str]:
    if not runs:
        return []
    lines = ["Left alone, for no journal here knows the run:"]
    for run in runs:
        lines += _things(run)
    lines.append(
        "They may belong to another vmsnap, with another state directory or on another host: then leave them to it."
    )
    lines.append(
        "What to do where no other vmsnap is at work, as after the state directory was lost: "
        "vmsnap reconcile --adopt RUN --dry-run, then without --dry-run."
    )
    return lines


def _things(run: UnknownRun) -> list[str]:
    guest = f", guest {printable(run.guest)}" if run.guest else ""
    lines = [f"  run {run.run}{guest}:"]
    if run.test_vm:
        lines.append(
            "    A TEST VM, or what is left of one: adopting it DESTROYS it, and needs --destroy-test-vms too."
        )
    return [*lines, *(f"    {thing.kind.value} {printable(thing.name)}" for thing in run.things)]
