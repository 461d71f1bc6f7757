"""Small questions to a guest that have nothing to do with its database."""

from __future__ import annotations

from uuid import UUID

from vmsnap.engines.asking import ask
from vmsnap.errors import GuestCommandError
from vmsnap.model.command import Command, Procedure

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def boot_id() -> Procedure[str]:
    """Return the id that the guest's kernel made when it booted (random(4)).

    A clone has its source's; another one means that the guest rebooted. May be repeated. Raises GuestCommandError.
    """
    result = yield from ask(Command(argv=("cat", "--", _BOOT_ID)), what="cannot read the guest's boot id")
    try:
        return str(UUID(result.text.strip()))
    except ValueError as error:
        raise GuestCommandError("the guest's boot id makes no sense", details=result.text[:200]) from error
