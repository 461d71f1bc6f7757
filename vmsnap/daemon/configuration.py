"""The configuration that the daemon works by. What is wrong in a file never replaces what was good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vmsnap.config.policies import PolicyBook, PolicyCheck
from vmsnap.config.settings import Settings, load_settings
from vmsnap.errors import ConfigError
from vmsnap.model.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Refused:
    """One file that is wrong. ``guest`` None: it is the settings' file, or a policy's whose guest cannot be told.

    ``kept``: what it said before is still gone by.
    """

    path: Path
    guest: str | None
    error: ConfigError
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is gone by. ``by_path``: policies by the file they came from."""

    settings: Settings
    by_path: Mapping[Path, Policy] = field(default_factory=dict)
    refused: tuple[Refused, ...] = ()

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Return the policies, by guest."""
        return tuple(sorted(self.by_path.values(), key=lambda policy: policy.guest))


def load(path: Path | None) -> Loaded:
    """Read everything for the first time.

    Raises ConfigError where the settings or the folder of policies cannot be used. A policy that is wrong is refused, and
    stops its own guest only.
    """
    settings = load_settings(path)
    return _take(settings, checks=PolicyBook(settings.policies).check(), before=Loaded(settings=settings))


def reload(path: Path | None, *, before: Loaded) -> Loaded:
    """Read everything again. What is wrong is refused, and what it said before stays. Raises nothing."""
    refused: tuple[Refused, ...] = ()
    settings = before.settings
    try:
        settings = _changeable(load_settings(path), before=settings)
    except ConfigError as error:
        refused = (Refused(path=path or Path("vmsnap.toml"), guest=None, error=error, kept=True),)
    try:
        checks = PolicyBook(settings.policies).check()
    except ConfigError as error:
        folder = Refused(path=settings.policies, guest=None, error=error, kept=True)
        return Loaded(settings=before.settings, by_path=before.by_path, refused=(*refused, folder))
    return _take(settings, checks=checks, before=before, refused=refused)


def _changeable(settings: Settings, *, before: Settings) -> Settings:
    """Return the settings, unless they differ in what a running daemon has its hands on: then raise ConfigError."""
    changed = [name for name, value in _fixed(settings).items() if value != _fixed(before)[name]]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} cannot change while the daemon runs",
            remedy="restart the daemon: systemctl restart vmsnap",
        )
    return settings


def _fixed(settings: Settings) -> dict[str, object]:
    return {
        "[store] path": settings.store.path,
        "[state] path": settings.state.path,
        "[runtime] path": settings.runtime.path,
        "[libvirt] uri": settings.libvirt.uri,
    }


def _take(
    settings: Settings, *, checks: tuple[PolicyCheck, ...], before: Loaded, refused: tuple[Refused, ...] = ()
) -> Loaded:
    by_path = {check.path: check.policy for check in checks if check.policy is not None}
    found = list(refused)
    for check in checks:
        if check.error is None:
            continue
        former = before.by_path.get(check.path)
        # A guest that another file has taken over meanwhile is that file's.
        kept = former is not None and former.guest not in {policy.guest for policy in by_path.values()}
        if former is not None and kept:
            by_path[check.path] = former
        guest = former.guest if former is not None and kept else check.guest
        found.append(Refused(path=check.path, guest=guest, error=check.error, kept=kept))
    return Loaded(settings=settings, by_path=by_path, refused=tuple(found))
