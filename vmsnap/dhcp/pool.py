"""Choosing the network that a clone is leased an address from."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network

from vmsnap.errors import PreconditionError
from vmsnap.model.ids import RunId

DEFAULT_POOL = IPv4Network("198.18.0.0/15")
"""Addresses for benchmarks (RFC 2544): routed nowhere, so a guest rarely has a route to them."""

_SLICE_BITS = 24


def choose_networks(
    run: RunId, *, count: int, avoid: Iterable[IPv4Network], pool: IPv4Network = DEFAULT_POOL
) -> tuple[IPv4Network, ...]:
    """Return ``count`` different /24 networks of ``pool`` that overlap nothing in ``avoid``.

    The same for the same run, and spread over the pool for different runs. Raises PreconditionError where the pool
    has too few.
    """
    slices = tuple(pool.subnets(new_prefix=_SLICE_BITS)) if pool.prefixlen <= _SLICE_BITS else ()
    avoided = tuple(avoid)
    start = int(run, 16) % len(slices) if slices else 0
    free = [net for net in slices[start:] + slices[:start] if not any(net.overlaps(other) for other in avoided)]
    if len(free) < count:
        raise PreconditionError(
            f"the address pool {pool} has {len(free)} free /24 networks and {count} are needed",
            details=f"not to be used: {', '.join(str(net) for net in avoided) or 'nothing'}",
            remedy="give the clone's network a pool that none of the guest's routes covers",
        )
    return tuple(free[:count])
