"""Names of environments: what a policy's template makes of them."""

from __future__ import annotations

import re
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vmsnap.model.ids import RunId
from vmsnap.model.policy import DnsPolicy, dns_name

RUN = RunId("00000000a1")
HOST_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+\Z")


def policy(name: str = "{environment}", *, zone: str = "test.example") -> DnsPolicy:
    return DnsPolicy(zone=zone, server=IPv4Address("192.0.2.53"), key_name="k", key_file="/k", name=name)


@pytest.mark.parametrize(
    ("template", "environment", "name"),
    [
        ("{environment}", "db1-test", "db1-test.test.example"),
        ("{environment}", "Copy of 'db' <1>", "copy-of-db-1.test.example"),
        ("{environment}", "a.b_c", "a-b-c.test.example"),
        ("{environment}", "ü", "00000000a1.test.example"),
        ("{environment}", "x" * 64, f"{'x' * 63}.test.example"),
        ("{environment}.{guest}", "db1-test", "db1-test.db1.test.example"),
        ("t-{environment}", "x" * 64, f"t-{'x' * 61}.test.example"),
        ("t-{run}", "db1-test", "t-00000000a1.test.example"),
        ("Test-{guest}", "db1-test", "test-db1.test.example"),
    ],
)
def test_what_becomes_of_a_name(template: str, environment: str, name: str) -> None:
    assert dns_name(policy(template), environment=environment, guest="db1", run=RUN) == name


def test_the_zone_may_end_in_a_dot() -> None:
    found = dns_name(policy(zone="Test.Example."), environment="db1", guest="db1", run=RUN)
    assert found == "db1.test.example"


@pytest.mark.parametrize(
    "template", ["", ".", "{environment}.", "a..b", "-{run}", "{nobody}", "a b", "{environment", "ü"]
)
def test_a_template_that_makes_no_name_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        policy(template)


def test_a_name_that_is_too_long_is_none() -> None:
    long = policy("{environment}.{environment}.{guest}", zone=f"{'z' * 60}.{'z' * 60}")
    with pytest.raises(ValueError, match="253"):
        dns_name(long, environment="x" * 64, guest="y" * 64, run=RUN)


@pytest.mark.parametrize("zone", ["", ".", "a b", "a..b", "-a", "ü.example", "x" * 64])
def test_a_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(ValidationError, match="zone"):
        policy(zone=zone)


@pytest.mark.parametrize("ttl", ["0s", "61s", "500ms"])
def test_others_may_remember_an_address_for_a_minute_at_most(ttl: str) -> None:
    with pytest.raises(ValidationError, match="ttl"):
        DnsPolicy.model_validate({**policy().model_dump(), "ttl": ttl})


@given(environment=st.text(min_size=1, max_size=64), guest=st.text(min_size=1, max_size=255))
def test_any_name_becomes_a_host_name(environment: str, guest: str) -> None:
    for template in ("{environment}", "{environment}.{guest}", "{run}"):
        assert HOST_NAME.match(dns_name(policy(template), environment=environment, guest=guest, run=RUN))
