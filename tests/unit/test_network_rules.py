"""The rules of a fence, as text: which links may speak to which. The kernel's part is in the integration tests."""

from __future__ import annotations

import pytest

from vmsnap.network import rules
from vmsnap.network.rules import Rule
from vmsnap.testing.fence_contract import fence_plan


def verdict(found: tuple[Rule, ...], *, hook: str, arrives_on: str, leaves_by: str) -> str:
    """Return what the chain of a hook of the bridge family decides for one frame: the first final verdict, or accept."""
    for rule in found:
        if rule.chain.family != "bridge" or rule.chain.hook != hook:
            continue
        if rule.arrives_on in {None, arrives_on} and rule.leaves_by in {None, leaves_by}:
            return rule.verdict
    return "accept"


@pytest.mark.parametrize("nics", [1, 2, 3])
def test_only_a_tap_and_its_own_veth_speak_to_each_other(nics: int) -> None:
    plan = fence_plan(nics=nics)
    found = rules.rules_of(plan)
    ours = {link for port in plan.ports for link in (port.tap, port.veth_host)}
    pairs = {pair for port in plan.ports for pair in ((port.tap, port.veth_host), (port.veth_host, port.tap))}
    for one in sorted(ours | {"eth0", "vnet7"}):
        for other in sorted(ours | {"eth0", "vnet7"}):
            if one == other:
                continue
            expected = "accept" if (one, other) in pairs or not {one, other} & ours else "drop"
            assert verdict(found, hook="forward", arrives_on=one, leaves_by=other) == expected
    for link in sorted(ours):
        assert verdict(found, hook="input", arrives_on=link, leaves_by="") == "drop"
        assert verdict(found, hook="output", arrives_on="", leaves_by=link) == "drop"
    assert verdict(found, hook="input", arrives_on="eth0", leaves_by="") == "accept"
    assert verdict(found, hook="output", arrives_on="", leaves_by="eth0") == "accept"


def test_every_rule_has_a_counter_of_its_own() -> None:
    labels = [rule.label for rule in rules.rules_of(fence_plan(nics=3))]
    assert len(labels) == len(set(labels))


def test_a_guest_without_nics_needs_no_rules() -> None:
    assert rules.rules_of(fence_plan(nics=0)) == ()
