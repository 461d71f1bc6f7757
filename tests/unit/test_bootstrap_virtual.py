"""Which drivers settings make, without anything being opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.bootstrap import make_world
from vmsnap.config.settings import HypervSettings, Settings, StoreSettings
from vmsnap.errors import ConfigError
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.fence import HyperVFence
from vmsnap.hypervisors.libvirt.driver import LibvirtHypervisor


def test_libvirt_is_the_default(tmp_path: Path) -> None:
    world = make_world(Settings(store=StoreSettings(path=tmp_path)))
    assert isinstance(world.hypervisor, LibvirtHypervisor)
    world.addressing.require_possible(to_connect=True)


def test_a_hyper_v_host_is_asked_only_when_it_is_needed(tmp_path: Path) -> None:
    hyperv = HypervSettings(
        host="hv1.example.org",
        credential="/does/not/exist",
        export_folder="D:\\vmsnap",
        export_mounted=tmp_path,
    )
    world = make_world(Settings(store=StoreSettings(path=tmp_path), hypervisor="hyperv", hyperv=hyperv))
    assert isinstance(world.hypervisor, HyperVHypervisor)
    assert isinstance(world.fence, HyperVFence)
    with pytest.raises(ConfigError, match="/does/not/exist"):
        world.hypervisor.guests()
