"""Opening a psql session to a PostgreSQL server in a guest, as the account that runs it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable

from vmsnap.engines.asking import last_words
from vmsnap.engines.drain_outcome import OPENED
from vmsnap.errors import PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure
from vmsnap.model.drain import Instance

_DATABASES = ("postgres", "template1")
_NO_SUCH_PROGRAM = 127
_NO_CONNECTION = 2


def connection(instance: Instance, *, database: str) -> tuple[str, ...]:
    """Return the arguments by which psql finds the server."""
    where = ["-d", database]
    if instance.socket_directory is not None:
        where += ["-h", instance.socket_directory]
    if instance.port is not None:
        where += ["-p", str(instance.port)]
    return tuple(where)


def in_session(instance: Instance, *, command: Callable[[str, str], Command]) -> Procedure[CommandResult]:
    """Run a script of psql, whose first statement has to print ``OPENED``, in the first database that lets it in.

    ``command`` makes the command of the program and the database. Raises PreconditionError where no session can be opened;
    what the script did after that is in the result.
    """
    program = posixpath.join(instance.programs, "psql")
    failures = []
    for database in _DATABASES:
        result = yield command(program, database)
        if result.exit_status == _NO_SUCH_PROGRAM and program != "psql":
            program = "psql"
            result = yield command(program, database)
        if OPENED in result.text.splitlines():
            return result
        failures.append(f"database {database}: {last_words(result) or f'status {result.exit_status}'}")
        if result.exit_status != _NO_CONNECTION:
            break
    raise PreconditionError(
        f"cannot open a session to the PostgreSQL server {instance.name} as {instance.user}; nothing was stopped",
        details="\n".join(failures),
        remedy=f"let the account {instance.user} of the guest connect locally as a superuser: a line "
        f"'local all {instance.user} peer' first in pg_hba.conf, or a password in its ~/.pgpass; psql must be there",
    )
