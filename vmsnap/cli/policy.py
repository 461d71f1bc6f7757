"""``vmsnap policy``: policy files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import due_fields, policy_check_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import moment, printable, printable_lines
from vmsnap.errors import ExitCode, VmsnapError

if TYPE_CHECKING:
    from vmsnap.config.policies import PolicyCheck
    from vmsnap.model.guest import Finding
    from vmsnap.model.policy import Policy
    from vmsnap.model.schedule import Due

_SHOWN = 3
_LONG = timedelta(days=31)

policies = typer.Typer(no_args_is_help=True, help="Check policy files, and show what they say.")


@policies.command("check")
def check_policies(ctx: typer.Context, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Check every policy file: syntax, keys, values, one file a guest. Exit code 2 where any is wrong.

    It also warns of notification URLs in vmsnap.toml that cannot be used. Nothing else is looked at; 'vmsnap doctor GUEST'
    looks at the guest itself.

    For example:

        vmsnap policy check
        vmsnap policy check --config ./vmsnap.toml --json
    """
    session = begin(ctx, json=json, config=config)
    checks = session.policies.check()
    folder = session.policies.folder
    warnings = {check.path: _warnings(check.policy, now=session.now()) for check in checks if check.policy is not None}
    settings = session.settings_warnings()

    def human(console: Console) -> None:
        _print(console, checks, folder=folder, warnings=warnings)
        _print_settings(console, settings)

    session.show(policy_check_document(checks, warnings=warnings, settings=settings), human=human)
    if any(check.error is not None for check in checks):
        raise typer.Exit(int(ExitCode.CONFIGURATION))


@policies.command("show")
def show_policy(
    ctx: typer.Context,
    guest: Annotated[str, typer.Argument(metavar="GUEST", help="The guest.", autocompletion=complete_guest)],
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show a guest's policy with every default filled in, as TOML, and when its next three runs are due.

    What is printed is a policy file again. A key that is not set stands in a comment, and so do the next runs.

    For example:

        vmsnap policy show db1
        vmsnap policy show db1 --json | jq .retention
    """
    session = begin(ctx, json=json, config=config)
    policy = session.policies.get(guest)
    from vmsnap.config.render import policy_text  # noqa: PLC0415 - loads pydantic, which --help does not need

    failure: str | None = None
    runs: tuple[Due, ...] = ()
    if policy.enabled:
        try:
            runs = session.application.upcoming(guest, count=_SHOWN)
        except VmsnapError as error:
            # The policy is what was asked for; where the store is not there it can be shown all the same.
            failure = error.brief
    lines = ["", *(f"# {line}" for line in _next_runs(runs, enabled=policy.enabled, failure=failure))]
    session.show(
        {**policy.model_dump(mode="json"), "next_due": [due_fields(due) for due in runs]},
        human=lambda console: print_lines(console, [*printable_lines(policy_text(policy)), *map(printable, lines)]),
    )


def _next_runs(runs: Sequence[Due], *, enabled: bool, failure: str | None) -> list[str]:
    if not enabled:
        return ["No run is due: enabled = false."]
    if failure is not None:
        return [f"When runs are due cannot be told: {failure}"]
    if runs[0].at is None:
        return [f"No run is due: {runs[0].reason}."]
    return ["The next runs are due:", *(f"  {moment(due.at)}  {due.reason}" for due in runs)]


def _warnings(policy: Policy, *, now: datetime) -> list[str]:
    """Return what is allowed and probably not meant: a guest that no schedule would back up for long."""
    from vmsnap.model.schedule import next_due  # noqa: PLC0415 - loads pydantic, which --help does not need

    if not policy.enabled:
        return []
    due = next_due(policy, newest=None, now=now)
    if due.at is None:
        return ["no window opens in the next ten years: it is never backed up by its schedule"]
    if due.at > now + _LONG:
        return [f"no run can start before {moment(due.at)}, when the next window opens"]
    later = next_due(policy, newest=now, now=now)
    return [f"its schedule ends: {later.reason}"] if later.at is None else []


def _print(
    console: Console, checks: Sequence[PolicyCheck], *, folder: Path, warnings: Mapping[Path, Sequence[str]]
) -> None:
    if not checks:
        print_lines(console, [f"No policy files in '{folder}'. Put one GUEST.toml in it for each guest."])
        return
    lines: list[str | Text] = []
    for check in checks:
        name = printable(check.path.name)
        if check.error is None:
            off = "" if check.policy is None or check.policy.enabled else ", not enabled"
            lines.append(Text.assemble(("ok     ", "green"), f" {name}: guest '{printable(check.guest or '')}'{off}"))
            lines += [
                Text.assemble("        ", ("warning: ", "yellow"), printable(text)) for text in warnings[check.path]
            ]
            continue
        lines.append(Text.assemble(("ERROR  ", "bold red"), f" {printable(check.error.brief)}"))
        lines += [f"          {line}" for line in printable_lines(check.error.details or "")]
        if check.error.remedy:
            lines.append(f"        what to do: {printable(check.error.remedy)}")
    print_lines(console, lines)


def _print_settings(console: Console, warnings: Sequence[Finding]) -> None:
    lines: list[str | Text] = []
    for finding in warnings:
        said = f"vmsnap.toml: {finding.check}: {printable(finding.message)}"
        lines.append(Text.assemble(("warning: ", "yellow"), said))
        if finding.remedy:
            lines.append(f"        what to do: {printable(finding.remedy)}")
    print_lines(console, lines)
