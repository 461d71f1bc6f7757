"""How a command has to fail: with its exit code, what is wrong, what to do, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt

from integration.installation import Installation, Outcome
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from vmsnap.hypervisors.libvirt.xml import parse


def refused(
    vmsnap: Installation, *arguments: str, code: int, names: tuple[str, ...], remedy: str, kind: str | None = None
) -> Any:
    """Run a command that must fail so, saying these things and this remedy. Returns the error's document."""
    return require_refusal(vmsnap.run(*arguments, "--json"), code=code, names=names, remedy=remedy, kind=kind)


def require_refusal(
    outcome: Outcome, *, code: int, names: tuple[str, ...], remedy: str, kind: str | None = None
) -> Any:
    assert outcome.exit_code == code, outcome.explain()
    error = outcome.document["error"]
    said = f"{error['brief']}\n{error['details'] or ''}"
    assert error["exit_code"] == code
    assert [name for name in names if name not in said] == [], outcome.explain()
    assert remedy in (error["remedy"] or ""), outcome.explain()
    assert error["also"] == [], "nothing went wrong in cleaning up"
    assert kind is None or error["class"] == kind
    assert "Traceback" not in outcome.stderr
    return error


@contextmanager
def unchanged(vmsnap: Installation, *guests: LabGuest) -> Iterator[None]:
    """The store and these guests are the same after the block as before it."""
    before = (_tree(vmsnap.store), [_picture(guest) for guest in guests])
    yield
    assert (_tree(vmsnap.store), [_picture(guest) for guest in guests]) == before


def _tree(folder: Path) -> list[tuple[str, int, int]]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", ".taken"))
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _picture(guest: LabGuest) -> list[object]:
    """Its state, and the disks of both its definitions."""
    texts = [guest.domain.XMLDesc(flags) for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE)]
    sources = [[dict(source.attrib) for source in parse(text).iter("source")] for text in texts]
    for source in (source for definition in sources for source in definition):
        source.pop("index", None)  # counts how often the disk was changed
    return [guest.domain.state()[0], *sources]


def doctor_refusals(vmsnap: Installation, guest: str) -> list[dict[str, str]]:
    """What doctor says stands in the way of a backup."""
    outcome = vmsnap.run("doctor", guest, "--json")
    assert outcome.exit_code == 3, outcome.explain()
    assert outcome.document["ready"] is False
    return [item for item in outcome.document["findings"] if item["severity"] == "refusal"]


def ssh_section(lab: Lab, *, key_file: Path | None = None, host_key: str = "", extra: str = "") -> str:
    line = f'host_key = "{host_key}"\n' if host_key else ""
    return f'[control.ssh]\nkey_file = "{key_file or lab.image.private_key}"\n{line}{extra}'
