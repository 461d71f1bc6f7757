"""The root of the command line: where every error becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from vmsnap.cli.context import Session
from vmsnap.cli.failures import as_vmsnap_error, error_document, print_error, print_json, print_traceback
from vmsnap.errors import CancelledError, ConfigError, VmsnapError

_GLOBAL_ONLY = ("--verbose", "--debug", "--version")


class ErrorGroup(TyperGroup):
    """A group whose errors are printed as vmsnap prints them, and whose exit codes are vmsnap's."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002, FBT001, FBT002 - the signature is the base class's
        windows_expand_args: bool = True,  # noqa: FBT001, FBT002
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and exit. Never returns."""
        arguments = list(sys.argv[1:] if args is None else args)
        session: Session = extra.setdefault("obj", None) or Session()
        extra["obj"] = session
        # A command line that cannot be parsed must still be answered in JSON.
        session.json = "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments
        try:
            code = super().main(
                args=arguments,
                prog_name=prog_name or "vmsnap",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except typer.TyperException as error:
            _fail(_usage_error(error, arguments=arguments), session=session)
        except typer.Abort:
            _fail(CancelledError("stopped at a question; nothing was done"), session=session)
        except Exception as error:  # noqa: BLE001 - the last line of defence; what nobody expected is a bug
            _fail(error, session=session)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An interrupt is an error like any other; a reader that has seen enough is none."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise CancelledError("interrupted", remedy="run the command again") from error
        except BrokenPipeError:
            # Flushing at exit must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _fail(error: Exception, *, session: Session) -> NoReturn:
    shown = as_vmsnap_error(error)
    if session.debug:
        print_traceback(error, stream=sys.stderr)
    if session.json:
        print_json(error_document(shown), stream=sys.stdout)
    else:
        print_error(shown, console=session.err, stream=sys.stderr)
    sys.exit(int(shown.exit_code))


def _usage_error(error: typer.TyperException, *, arguments: Sequence[str]) -> VmsnapError:
    """Return the error for a command line that makes no sense."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vmsnap"
    remedy = f"see '{command} --help'"
    misplaced = [name for name in _GLOBAL_ONLY if name in arguments and name in error.format_message()]
    if misplaced:
        remedy = f"{misplaced[0]} goes before the command: vmsnap {misplaced[0]} ..."
    message = error.format_message().rstrip(".") or "a command is missing"
    return ConfigError(f"{message[:1].lower()}{message[1:]}", remedy=remedy)
