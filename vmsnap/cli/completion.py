"""Shell completion: names of guests, snapshots and environments. Cheap, and silent where anything is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from vmsnap.cli.context import Session

_Finder = Callable[[Session], Iterable[str]]


def complete_guest(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return guests that have a policy."""
    return _complete(ctx, incomplete, find=_guests)


def complete_snapshot(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return ids of snapshots, and GUEST@latest."""
    return _complete(ctx, incomplete, find=_snapshots)


def complete_snapshot_id(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return ids of snapshots."""
    return _complete(ctx, incomplete, find=lambda session: [one.id for one in session.application.snapshots(None)])


def complete_stored_guest(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return guests that have snapshots, with a policy or without."""
    return _complete(
        ctx, incomplete, find=lambda session: [one.manifest.guest for one in session.application.snapshots(None)]
    )


def complete_guest_or_snapshot(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return what ``vmsnap provision`` takes."""
    return _complete(ctx, incomplete, find=lambda session: [*_guests(session), *_snapshots(session)])


def complete_environment(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return names of environments."""
    return _complete(ctx, incomplete, find=_environments)


def _complete(ctx: typer.Context, incomplete: str, *, find: _Finder) -> list[str]:
    try:
        root = ctx.find_root()
        session = root.obj if isinstance(root.obj, Session) else Session()
        config = ctx.params.get("config") or root.params.get("config")
        session.set_options(json=False, config=Path(config) if config else None)
        return sorted(name for name in set(find(session)) if name.startswith(incomplete))
    except Exception:  # noqa: BLE001 - a shell in the middle of a line is no place for errors
        return []


def _guests(session: Session) -> list[str]:
    return [check.guest for check in session.policies.check() if check.guest is not None]


def _snapshots(session: Session) -> list[str]:
    names: list[str] = []
    for snapshot in session.application.snapshots(None):
        names += [snapshot.id, f"{snapshot.manifest.guest}@latest"]
    return names


def _environments(session: Session) -> list[str]:
    # The book itself: asking the application would ask the hypervisor for the state of each.
    from vmsnap.state.environments import FileEnvironmentBook  # noqa: PLC0415

    return [environment.name for environment in FileEnvironmentBook(session.settings.state.path).all()]
