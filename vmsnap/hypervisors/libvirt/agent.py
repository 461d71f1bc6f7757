"""The line to a domain's QEMU guest agent, through libvirt's API.

libvirt synchronises with the agent before each command, so an answer left over from the original is not taken for ours.
"""

from __future__ import annotations

import math
from datetime import timedelta

import libvirt
import libvirt_qemu

from vmsnap.errors import GuestCommandError, GuestUnreachableError
from vmsnap.hypervisors.libvirt.connection import Connection, translate

# The domain is not running, or has no agent channel.
_NOBODY_THERE = (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED)
# Before libvirt 11.2 an agent's refusal, and an answer that is no JSON, have no error code of their own; an answer of
# more than 10 MiB is ERANGE, told as an error of the system.
_BAD_ANSWER = (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR)


class LibvirtAgentChannel:
    """Implements ports.guest.AgentChannel for one domain."""

    def __init__(self, connection: Connection, *, domain: str) -> None:
        self._connection = connection
        self._domain = domain

    def send(self, request: str, *, timeout: timedelta) -> str:
        """Send one request and return its answer; timeouts are whole seconds, one at least."""
        domain = self._connection.domain(self._domain)
        seconds = max(1, math.ceil(timeout.total_seconds()))
        try:
            answer: str = libvirt_qemu.qemuAgentCommand(domain, request, seconds, 0)
        except libvirt.libvirtError as error:
            doing = f"ask the guest agent of {self._domain!r}"
            if error.get_error_code() in _NOBODY_THERE:
                raise GuestUnreachableError(f"the guest agent of {self._domain!r} is not there: {error}") from error
            if error.get_error_code() in _BAD_ANSWER:
                raise GuestCommandError(
                    f"the guest agent of {self._domain!r} refused, or made no sense: {error}",
                    remedy="update or restart qemu-guest-agent in the guest, or give [control.ssh] in the policy",
                ) from error
            raise translate(error, doing=doing) from error
        return answer
