"""``vmsnap policy``: policy files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import policy_check_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import printable, printable_lines
from vmsnap.errors import ExitCode

if TYPE_CHECKING:
    from vmsnap.config.policies import PolicyCheck

policies = typer.Typer(no_args_is_help=True, help="Check policy files, and show what they say.")


@policies.command("check")
def check_policies(ctx: typer.Context, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Check every policy file: syntax, keys, values, one file a guest. Exit code 2 where any is wrong.

    Nothing else is looked at; 'vmsnap doctor GUEST' looks at the guest itself.

    For example:

        vmsnap policy check
        vmsnap policy check --config ./vmsnap.toml --json
    """
    session = begin(ctx, json=json, config=config)
    checks = session.policies.check()
    folder = session.policies.folder
    session.show(policy_check_document(checks), human=lambda console: _print(console, checks, folder=folder))
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
    """Show a guest's policy with every default filled in, as TOML.

    What is printed is a policy file again. A key that is not set stands in a comment.

    For example:

        vmsnap policy show db1
        vmsnap policy show db1 --json | jq .retention
    """
    session = begin(ctx, json=json, config=config)
    policy = session.policies.get(guest)
    from vmsnap.config.render import policy_text  # noqa: PLC0415 - loads pydantic, which --help does not need

    session.show(
        policy.model_dump(mode="json"),
        human=lambda console: print_lines(console, printable_lines(policy_text(policy))),
    )


def _print(console: Console, checks: Sequence[PolicyCheck], *, folder: Path) -> None:
    if not checks:
        print_lines(console, [f"No policy files in '{folder}'. Put one GUEST.toml in it for each guest."])
        return
    lines: list[str | Text] = []
    for check in checks:
        name = printable(check.path.name)
        if check.error is None:
            off = "" if check.policy is None or check.policy.enabled else ", not enabled"
            lines.append(Text.assemble(("ok     ", "green"), f" {name}: guest '{printable(check.guest or '')}'{off}"))
            continue
        lines.append(Text.assemble(("ERROR  ", "bold red"), f" {printable(check.error.brief)}"))
        lines += [f"          {line}" for line in printable_lines(check.error.details or "")]
        if check.error.remedy:
            lines.append(f"        what to do: {printable(check.error.remedy)}")
    print_lines(console, lines)
