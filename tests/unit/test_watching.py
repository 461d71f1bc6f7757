"""Whose DHCP exchanges are watched, by policy files that come, go and are wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vmsnap.config.policies import PolicyBook
from vmsnap.errors import ConfigError, PreconditionError
from vmsnap.network.watcher import Watched
from vmsnap.testing.world import FakeWorld
from vmsnap.watching import GuestWatch


class Scene:
    """A host with some guests, and a folder of policies."""

    def __init__(self, folder: Path) -> None:
        self.lab = FakeWorld(folder)
        for name in ("a", "b"):
            self.lab.add_guest(name)
        self.folder = folder / "policies"
        self.folder.mkdir()

    def write(self, name: str, text: str = "") -> None:
        (self.folder / f"{name}.toml").write_text(text)

    def watch(self, *guests: str) -> GuestWatch:
        hypervisor = self.lab.process().hypervisor
        watch = GuestWatch(hypervisor, policies=PolicyBook(self.folder), guests=guests, interfaces=("br0",))
        watch.begin()
        return watch

    def macs(self, *guests: str) -> frozenset[str]:
        return frozenset(mac.lower() for guest in guests for mac in self.lab.host.machines[guest].macs)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_guest_whose_policy_comes_later_is_watched_from_the_next_look_on(scene: Scene) -> None:
    scene.write("db")
    watch = scene.watch()
    assert watch.look().macs == scene.macs("db")
    scene.write("a")
    seen = watch.look()
    assert seen == Watched(macs=scene.macs("db", "a"), interfaces=frozenset({"br0"}))
    assert {watch.guest_of(mac) for mac in scene.macs("a")} == {"a"}
    (scene.folder / "db.toml").unlink()
    scene.write("a", '[isolation]\nexchanges = "none"\n')
    assert watch.look().macs == frozenset()
    assert watch.guest_of(next(iter(scene.macs("db")))) == ""


def test_a_file_that_is_wrong_stops_its_own_guest_only_and_is_told_once(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.write("db")
    scene.write("a", "keep = 1\n")
    with caplog.at_level(logging.INFO, logger="vmsnap.watching"):
        watch = scene.watch()
        for _ in range(3):
            assert watch.look().macs == scene.macs("db")
        assert caplog.text.count("refused") == 1
        assert "a.toml" in caplog.text
        assert "policy check" in caplog.text
        scene.write("a")
        assert watch.look().macs == scene.macs("db", "a")
        assert "a.toml is right again, or gone" in caplog.text
        scene.write("a", "keep = 1\n")
        assert watch.look().macs == scene.macs("db", "a"), "what it said before stays"
        assert "what it said before stays" in caplog.text
        scene.write("c", 'guest = "a"\n')
        scene.write("a", 'guest = "b"\n')
        assert watch.look().macs == scene.macs("db", "a", "b")


def test_a_folder_that_cannot_be_read_for_a_while_changes_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.write("db")
    watch = scene.watch()
    scene.folder.rename(scene.folder.with_name("away"))
    for _ in range(3):
        assert watch.look().macs == scene.macs("db")
    assert caplog.text.count("the policies cannot be read again") == 1
    scene.folder.with_name("away").rename(scene.folder)
    scene.write("a")
    assert watch.look().macs == scene.macs("db", "a")


def test_who_is_named_has_to_be_known_at_the_start(scene: Scene) -> None:
    scene.write("db")
    scene.write("a", "keep = 1\n")
    with pytest.raises(ConfigError):
        scene.watch("db", "a")
    with pytest.raises(PreconditionError, match="has no policy"):
        scene.watch("ghost")
    scene.write("a")
    assert scene.watch("a").look().macs == scene.macs("a")


def test_nobody_to_watch_is_told_unless_a_file_is_wrong(scene: Scene) -> None:
    scene.write("db", '[isolation]\nexchanges = "none"\n')
    with pytest.raises(PreconditionError, match="no policy wants"):
        scene.watch()
    scene.write("a", "keep = 1\n")
    watch = scene.watch()
    assert watch.look().macs == frozenset()
    scene.write("a")
    assert watch.look().macs == scene.macs("a")


def test_a_guest_that_cannot_be_described_keeps_no_other_from_being_watched(scene: Scene) -> None:
    scene.write("db")
    scene.write("ghost")
    assert scene.watch().look().macs == scene.macs("db")
