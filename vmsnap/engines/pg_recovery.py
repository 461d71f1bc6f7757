"""Whether the crash recovery of a PostgreSQL server can be trusted: a clone of the disks alone has just gone through one.

Without ``fsync`` the server does not order its writes, and without ``full_page_writes`` it cannot mend a page that was half
written: recovery then ends as ever, and says nothing of what it could not know (PostgreSQL's manual, "Write Ahead Log").
"""

from __future__ import annotations

from vmsnap.engines.asking import PLAIN_MESSAGES, last_words
from vmsnap.engines.pg_session import connection, in_session
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.model.drain import Instance

_SETTING = "vmsnap-setting "
_NEEDED = ("fsync", "full_page_writes")
SETTINGS_SCRIPT = r"""
\set ON_ERROR_STOP on
SELECT 'vmsnap-drain opened';
SELECT 'vmsnap-setting ' || name || ' ' || setting FROM pg_catalog.pg_settings WHERE name IN ('fsync', 'full_page_writes');
"""


def require_recoverable(instance: Instance) -> Procedure[None]:
    """Ask a running server for its settings. See ``require_safe``. May be repeated."""

    def command(program: str, database: str) -> Command:
        return Command(
            argv=(*PLAIN_MESSAGES, program, "-XqAtw", *connection(instance, database=database), "-f", "-"),
            user=instance.user,
            stdin=SETTINGS_SCRIPT.encode(),
        )

    require_safe(instance, result=(yield from in_session(instance, command=command)))


def require_safe(instance: Instance, *, result: CommandResult) -> None:
    """Judge what ``SETTINGS_SCRIPT`` printed.

    Raises PreconditionError where the server is set up so that its recovery proves nothing, GuestCommandError where it did
    not say.
    """
    lines = [line.removeprefix(_SETTING).split() for line in result.text.splitlines() if line.startswith(_SETTING)]
    found = {words[0]: words[1] for words in lines if len(words) == 2}
    if result.exit_status != 0 or set(found) != set(_NEEDED):
        raise GuestCommandError(
            f"cannot read the settings of the PostgreSQL server {instance.name} (psql ended with status {result.exit_status})",
            details=last_words(result),
        )
    unsafe = [f"{name} = {found[name]}" for name in _NEEDED if found[name] != "on"]
    if unsafe:
        raise PreconditionError(
            f"the PostgreSQL server {instance.name} runs with {', '.join(unsafe)}: its recovery, which a clone of the disks "
            "alone goes through, proves nothing",
            remedy="set fsync and full_page_writes to on in the guest, or capture its memory as well (capture.mode)",
        )
