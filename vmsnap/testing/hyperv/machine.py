"""A Hyper-V host as a state machine: one method for each cmdlet, in snake case, with the cmdlet's own parameters."""

from __future__ import annotations

from vmsnap.testing.hyperv.folders import Folders


class HyperVHost(Folders):
    """Everything that vmsnap's scripts can do on a host. See ``host.HostState`` for what tests set and ask.

    Cmdlets raise ``CmdletError``. A parameter that a method does not have is one that nobody has looked into yet.
    """
