"""A clone's ports at a service address of the host, while its backup lasts: to look on, or for a tool of the site's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

from vmsnap.model.isolation import FencePlan
from vmsnap.ports.service import Opener
from vmsnap.workflow.run import Run, as_vmsnap_error, closing
from vmsnap.workflow.world import World

_CONNECT_TIMEOUT = timedelta(seconds=10)


@contextmanager
def clone_served(
    world: World,
    *,
    run: Run,
    fence: FencePlan,
    address: str | None,
    ports: tuple[int, ...],
    warn: Callable[[str], None],
) -> Iterator[None]:
    """Relay these ports of the clone at a service address during the body. A failure of that is a warning, no more.

    The address is the run's, and goes with it; the relays end with the body.
    """
    with ExitStack() as relays:
        if ports and address is None:
            warn('the clone has no address, so none of its ports is served; isolation.address = "always" gives it one')
        elif ports and address is not None:
            try:
                _serve(world, run=run, fence=fence, address=address, ports=ports, relays=relays)
            except Exception as error:  # noqa: BLE001 - the backup does not need it
                told = as_vmsnap_error(error, doing="serving the clone's ports")
                relays.close()
                warn(f"the clone's ports are not served: {told.brief}")
        yield


def _serve(
    world: World, *, run: Run, fence: FencePlan, address: str, ports: tuple[int, ...], relays: ExitStack
) -> None:
    connect = world.fence.connector(fence)

    def opener(port: int) -> Opener:
        return lambda: connect(address, port, _CONNECT_TIMEOUT)

    resource = world.services.resource(run.id, guest=fence.guest)
    run.acquire(resource, lambda: world.services.make(resource))
    for port in ports:
        relays.enter_context(closing(world.services.listen(resource, port=port, opener=opener(port))))
    served = ", ".join(str(port) for port in ports)
    run.progress.note(f"the clone is served at {world.services.address(resource)}, port {served}")
