"""Python twins of the scripts in ``vmsnap/hypervisors/hyperv/scripts``: what each does, in terms of the simulated host.

A twin is bound to its script by the SHA-256 of the script's text: a script that was edited has no twin until somebody looked
at both and wrote the new digest down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from vmsnap.testing.hyperv.failures import Category, CmdletError
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.values import VirtualMachine, VMSwitch

Values = Mapping[str, object]
"""What a script was given, by the names of its parameters."""

Emitted = dict[str, str | int | float | bool]
"""One object that a script emits."""

Body = Callable[[HyperVHost, Values], Iterator[Emitted]]

_SCRIPTS = resources.files("vmsnap.hypervisors.hyperv") / "scripts"


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A script's twin and the digest of the script that it is the twin of."""

    sha256: str
    body: Body


TWINS: dict[str, Twin] = {}
"""All twins by the names of their scripts. ``vmsnap.testing.hyperv.running`` fills it."""


def twin(name: str, *, sha256: str) -> Callable[[Body], Body]:
    """Register the twin of a script."""

    def register(body: Body) -> Body:
        TWINS[name] = Twin(sha256=sha256, body=body)
        return body

    return register


@cache
def digest_of(name: str) -> str:
    """Return the SHA-256 of a script's text, with line feeds."""
    text = (_SCRIPTS / f"{name}.ps1").read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def thrown(error_id: str) -> CmdletError:
    """Return what ``throw 'TEXT'`` makes: an error whose id and message are the text."""
    return CmdletError(
        error_id,
        error_id=error_id,
        category=Category.INVALID_OPERATION,
        exception_type="System.Management.Automation.RuntimeException",
    )


def text(values: Values, name: str) -> str:
    """Return a parameter that is a text; one that is mandatory and empty is refused by PowerShell itself."""
    value = values[name]
    if not isinstance(value, str):
        raise TypeError(name)
    return value


def number(values: Values, name: str) -> int:
    """Return a parameter that is a number."""
    value = values[name]
    if not isinstance(value, int):
        raise TypeError(name)
    return value


def texts(values: Values, name: str) -> Sequence[str]:
    """Return a parameter that is a list of texts."""
    value = values[name]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(name)
    return [str(item) for item in value]


def one_vm(host: HyperVHost, values: Values) -> VirtualMachine:
    """Return the VM of ``-Id``."""
    (vm,) = host.get_vm(id=text(values, "Id"))
    return vm


def our_vm(host: HyperVHost, values: Values) -> VirtualMachine:
    """Return the VM of ``-Id``, which has to bear the tag."""
    vm = one_vm(host, values)
    if not vm.notes.startswith(text(values, "Tag")):
        raise thrown("VmsnapNotOurs")
    return vm


def one_switch(host: HyperVHost, identity: str) -> VMSwitch:
    """Return the switch of an id."""
    (switch,) = host.get_vm_switch(id=identity)
    return switch
