from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

from vmsnap.errors import PreconditionError
from vmsnap.model.guest import Guest
from vmsnap.model.policy import ControlPolicy, IsolationPolicy, Policy, SshPolicy
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.reach import choose
from vmsnap.workflow.whereabouts import old_addresses

SSH = SshPolicy(key_file="/etc/vmsnap/key")


def _guest(lab: FakeWorld) -> Guest:
    return lab.process().hypervisor.inspect("db")


def test_an_agent_that_answers_needs_nothing_else(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", control=ControlPolicy(ssh=SSH))
    login = choose(lab.process(), policy=policy, guest=_guest(lab))
    assert (login.agent, login.ssh) == (True, None)
    assert login.addresses[0].interface == IPv4Interface("10.0.0.1/24")


def test_ssh_alone_does_not_ask_the_agent_and_pins_the_guests_key(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", control=ControlPolicy(via="ssh", ssh=SSH))
    with lab.ssh_servers(clone_address="198.18.7.10"):
        login = choose(lab.process(), policy=policy, guest=_guest(lab))
    assert not login.agent
    assert login.ssh is not None
    assert login.ssh.host_key == lab.host.machines["db"].host_key


def test_a_key_from_the_policy_is_not_asked_for(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    ssh = SSH.model_copy(update={"host_key": "ssh-ed25519 AAAAgiven"})
    policy = Policy(guest="db", control=ControlPolicy(via="ssh", ssh=ssh))
    login = choose(lab.process(), policy=policy, guest=_guest(lab))
    assert login.ssh is not None
    assert login.ssh.host_key == "ssh-ed25519 AAAAgiven"


def test_a_server_that_does_not_show_its_key_is_an_error(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", control=ControlPolicy(via="ssh", ssh=SSH))
    with pytest.raises(PreconditionError):
        choose(lab.process(), policy=policy, guest=_guest(lab))


def test_the_agent_alone_falls_back_to_nothing(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.answers = False
    policy = Policy(guest="db", control=ControlPolicy(via="agent", ssh=SSH))
    with pytest.raises(PreconditionError, match="allows nothing else") as caught:
        choose(lab.process(), policy=policy, guest=_guest(lab))
    assert caught.value.remedy


def test_the_policys_address_wins_over_what_was_seen(tmp_path: Path) -> None:
    isolation = IsolationPolicy(old_address=IPv4Interface("192.0.2.7/26"), old_gateway=IPv4Address("192.0.2.1"))
    (found,) = old_addresses(Policy(guest="db", isolation=isolation), guest=_guest(FakeWorld(tmp_path)))
    assert (str(found.interface), str(found.gateway)) == ("192.0.2.7/26", "192.0.2.1")


def test_an_address_without_a_prefix_is_taken_for_a_slash_24(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].addresses = (IPv4Interface("192.0.2.7/32"), IPv4Interface("10.1.2.3/16"))
    found = old_addresses(Policy(guest="db"), guest=_guest(lab))
    assert [str(address.interface) for address in found] == ["192.0.2.7/24", "10.1.2.3/16"]
