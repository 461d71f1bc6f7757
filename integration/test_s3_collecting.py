"""Uploads, removals and collectors interleaved and killed, over a real S3 server: no live block is lost, all garbage goes."""

from __future__ import annotations

import itertools

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from integration.s3_server import S3Server
from tests.unit.packs_interleaving import Interleaving
from vmsnap.model.objects import S3Place
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.objects.s3 import S3Objects

_EXAMPLES, _STEPS = 6, 15
_prefixes = itertools.count()


def test_no_live_block_is_lost_and_all_garbage_goes(s3_server: S3Server) -> None:
    bucket = s3_server.bucket()

    class OnServer(Interleaving):
        def new_place(self) -> ObjectStore:
            place = S3Place(endpoint=s3_server.endpoint, bucket=bucket, prefix=f"garbage/{next(_prefixes)}")
            return S3Objects(place, keys=s3_server.keys, page=50)

    run_state_machine_as_test(
        OnServer,
        settings=settings(
            max_examples=_EXAMPLES,
            stateful_step_count=_STEPS,
            deadline=None,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
