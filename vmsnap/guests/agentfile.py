"""Reading a small file through the QEMU guest agent's own file commands (``qga/qapi-schema.json``): no program is run."""

from __future__ import annotations

import json
from datetime import timedelta

from pydantic import Field

from vmsnap.errors import GuestCommandError
from vmsnap.guests.agent import Answer, decode, parse
from vmsnap.ports.guest import AgentChannel

_BYTES = 4096
_MISSING = "No such file or directory"  # strerror(3), as the agent passes it on


class _Read(Answer):
    content: str = Field(alias="buf-b64")


def read_file(channel: AgentChannel, *, path: str, timeout: timedelta) -> bytes | None:
    """Return the first 4 KiB of a file, or None where there is none. See ``vmsnap.ports.guest.GuestAccess``."""
    try:
        handle = _handle(_ask(channel, "guest-file-open", {"path": path, "mode": "r"}, timeout=timeout))
    except GuestCommandError as error:
        if _MISSING in f"{error.brief}\n{error.details}":
            return None
        raise
    try:
        answer = _ask(channel, "guest-file-read", {"handle": handle, "count": _BYTES}, timeout=timeout)
        return decode(parse(_Read, answer).content)
    finally:
        _ask(channel, "guest-file-close", {"handle": handle}, timeout=timeout)


def _ask(channel: AgentChannel, request: str, arguments: dict[str, object], *, timeout: timedelta) -> str:
    return channel.send(json.dumps({"execute": request, "arguments": arguments}), timeout=timeout)


def _handle(text: str) -> int:
    """Read an answer that is a bare number."""
    try:
        answer = json.loads(text)
        handle = answer["return"] if "return" in answer else parse(Answer, text)
    except (ValueError, KeyError, TypeError) as error:
        raise GuestCommandError("the guest agent's answer makes no sense", details=text[:200]) from error
    if not isinstance(handle, int) or isinstance(handle, bool):
        raise GuestCommandError("the guest agent's answer makes no sense", details=text[:200])
    return handle
