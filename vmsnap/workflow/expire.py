"""Environments whose time has come, and their end."""

from __future__ import annotations

from collections.abc import Iterator

from vmsnap.errors import EnvironmentNotFoundError
from vmsnap.model.environment import Environment, Expiry
from vmsnap.model.history import Action
from vmsnap.workflow.provision import destroy_environment
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World


def expired(world: World) -> tuple[Environment, ...]:
    """Return the environments whose time has come, by name."""
    now = world.clock.now()
    return tuple(one for one in world.book.all() if one.expires is not None and one.expires <= now)


def expire(world: World, *, dry_run: bool) -> Iterator[Expiry]:
    """Remove the environments whose time has come, and yield what became of each; a dry run removes none.

    One that cannot be removed stops no other. One that somebody extends or removes meanwhile is passed over. May be repeated.
    """
    for environment in expired(world):
        if dry_run:
            yield Expiry(environment=environment, removed=False)
            continue
        if environment not in expired(world):
            continue  # the one before it took its time
        try:
            destroy_environment(world, name=environment.name, action=Action.EXPIRE)
        except EnvironmentNotFoundError:
            continue
        except Exception as caught:  # noqa: BLE001 - one environment's failure stops no other
            error = as_vmsnap_error(caught, doing=f"removing environment {environment.name}")
            yield Expiry(environment=environment, removed=False, error=error)
        else:
            yield Expiry(environment=environment, removed=True)
