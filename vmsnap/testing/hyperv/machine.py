"""A Hyper-V host as a state machine: one method for each cmdlet, in snake case, with the cmdlet's own parameters."""

from __future__ import annotations

from vmsnap.testing.hyperv.folders import Folders
from vmsnap.testing.hyperv.power import saved_state
from vmsnap.testing.hyperv.values import ALIVE, VMState


class HyperVHost(Folders):
    """Everything that vmsnap's scripts can do on a host. See ``host.HostState`` for what tests set and ask.

    Cmdlets raise ``CmdletError``. A parameter that a method does not have is one that nobody has looked into yet.
    """

    def restart(self) -> None:
        """Boot the host anew: what went on is broken off, plans are forgotten, VMs stop and start as each is set up to."""
        with self.turn:
            for job in self.jobs:
                job.undo()
            self.jobs.clear()
            self.planned.clear()
            ran = [vm for vm in self.vms if vm.state in ALIVE]
            for vm in ran:
                if vm.automatic_stop_action == "Save" and vm.state is VMState.RUNNING:
                    vm.truth.saved, vm.state = saved_state(vm), VMState.SAVED
                else:
                    self.end(vm, in_order=False)
            for vm in self.vms:
                if vm.automatic_start_action == "Start" or (
                    vm.automatic_start_action == "StartIfRunning" and vm in ran
                ):
                    self.start_vm(vm=vm)
