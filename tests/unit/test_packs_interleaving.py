"""The real uploader, remover and collector under any interleaving of their calls, and any death."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.packs_interleaving import Interleaving


def test_no_live_block_is_lost_and_all_garbage_goes() -> None:
    run_state_machine_as_test(
        Interleaving,
        settings=settings(
            max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
