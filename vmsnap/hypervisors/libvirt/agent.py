"""The line to a domain's QEMU guest agent, through libvirt's API.

libvirt synchronises with the agent before each command, so an answer left over from the original is not taken for ours.
"""

from __future__ import annotations

import math
from datetime import timedelta

import libvirt_qemu

from vmsnap.hypervisors.libvirt.connection import Connection, translated


class LibvirtAgentChannel:
    """Implements ports.guest.AgentChannel for one domain."""

    def __init__(self, connection: Connection, *, domain: str) -> None:
        self._connection = connection
        self._domain = domain

    def send(self, request: str, *, timeout: timedelta) -> str:
        """Send one request and return its answer; timeouts are whole seconds, one at least."""
        domain = self._connection.domain(self._domain)
        with translated(f"ask the guest agent of {self._domain!r}"):
            answer: str = libvirt_qemu.qemuAgentCommand(domain, request, max(1, math.ceil(timeout.total_seconds())), 0)
        return answer
