"""Reloading: what is good counts at once, what is wrong is refused, and what was good before stays."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.daemon.configuration import Loaded, load, reload
from vmsnap.errors import ConfigError


class Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "vmsnap.toml"
        (folder / "policies").mkdir()
        self.settings()

    def settings(self, text: str = "") -> None:
        self.config.write_text(f'[store]\npath = "/srv"\n[state]\npath = "{self.folder}"\n{text}')

    def policy(self, name: str, text: str = "") -> Path:
        path = self.folder / "policies" / f"{name}.toml"
        path.write_text(text)
        return path

    def load(self) -> Loaded:
        return load(self.config)

    def reload(self, before: Loaded) -> Loaded:
        return reload(self.config, before=before)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def guests(loaded: Loaded) -> list[str]:
    return [policy.guest for policy in loaded.policies]


def refused(loaded: Loaded) -> list[tuple[str, str | None, bool]]:
    return [(one.path.name, one.guest, one.kept) for one in loaded.refused]


def every(loaded: Loaded, guest: str) -> timedelta | None:
    (policy,) = (policy for policy in loaded.policies if policy.guest == guest)
    return policy.schedule.every


def test_at_the_start_a_wrong_policy_is_refused_and_a_wrong_setting_ends_it(files: Files) -> None:
    files.policy("good")
    files.policy("bad", "nonsense = 1")
    loaded = files.load()
    assert guests(loaded) == ["good"]
    assert refused(loaded) == [("bad.toml", "bad", False)]
    files.settings("nonsense = 1")
    with pytest.raises(ConfigError):
        files.load()
    files.settings("[daemon]\ntick = '1ms'")
    with pytest.raises(ConfigError, match="tick"):
        files.load()


def test_good_changes_count_and_removed_policies_are_gone(files: Files) -> None:
    files.policy("one", 'schedule.every = "1h"')
    gone = files.policy("two")
    before = files.load()
    files.policy("one", 'schedule.every = "2h"')
    gone.unlink()
    files.policy("three")
    files.settings("[daemon]\ntick = '10s'")
    after = files.reload(before)
    assert guests(after) == ["one", "three"]
    assert every(after, "one") == timedelta(hours=2)
    assert after.settings.daemon.tick == timedelta(seconds=10)
    assert after.refused == ()


def test_a_policy_that_became_wrong_is_refused_and_its_former_one_stays_until_it_is_right_again(files: Files) -> None:
    files.policy("one", 'schedule.every = "1h"')
    files.policy("other")
    before = files.load()
    files.policy("one", 'schedule.every = "soon"')
    files.policy("new", "nonsense")
    after = files.reload(before)
    assert guests(after) == ["one", "other"]
    assert every(after, "one") == timedelta(hours=1)
    assert refused(after) == [("new.toml", "new", False), ("one.toml", "one", True)]
    again = files.reload(after)
    assert (guests(again), refused(again)) == (guests(after), refused(after))
    files.policy("one", 'schedule.every = "3h"')
    mended = files.reload(again)
    assert every(mended, "one") == timedelta(hours=3)
    assert refused(mended) == [("new.toml", "new", False)]


def test_a_policy_whose_guest_can_no_longer_be_told_stays_that_guests(files: Files) -> None:
    files.policy("file", 'guest = "db/1"\nschedule.every = "1h"')
    before = files.load()
    files.policy("file", 'guest = "db/1')
    after = files.reload(before)
    assert guests(after) == ["db/1"]
    assert refused(after) == [("file.toml", "db/1", True)]


def test_a_guest_that_another_file_took_over_is_that_files(files: Files) -> None:
    files.policy("a", 'guest = "db"\nschedule.every = "1h"')
    before = files.load()
    files.policy("a", 'guest = "db2"\nnonsense = 1')
    files.policy("b", 'guest = "db"\nschedule.every = "2h"')
    after = files.reload(before)
    assert guests(after) == ["db"]
    assert every(after, "db") == timedelta(hours=2)
    assert refused(after) == [("a.toml", "db2", False)]


def test_two_files_for_one_guest_are_refused_and_the_one_before_stays(files: Files) -> None:
    files.policy("db", 'schedule.every = "1h"')
    before = files.load()
    files.policy("twin", 'guest = "db"')
    after = files.reload(before)
    assert guests(after) == ["db"]
    assert every(after, "db") == timedelta(hours=1)
    assert refused(after) == [("db.toml", "db", True), ("twin.toml", "db", False)]


def test_wrong_settings_are_refused_and_policies_are_read_all_the_same(files: Files) -> None:
    files.policy("one")
    before = files.load()
    files.settings("nonsense = 1")
    files.policy("two")
    after = files.reload(before)
    assert after.settings == before.settings
    assert guests(after) == ["one", "two"]
    assert refused(after) == [("vmsnap.toml", None, True)]


def test_what_a_running_daemon_has_its_hands_on_needs_a_restart(files: Files) -> None:
    before = files.load()
    files.config.write_text('[store]\npath = "/elsewhere"\n[state]\npath = "/elsewhere"\n[daemon]\ntick = "10s"\n')
    after = files.reload(before)
    assert after.settings == before.settings
    (one,) = after.refused
    assert one.error.brief == "[store] path, [state] path cannot change while the daemon runs"
    assert one.error.remedy is not None
    assert "restart" in one.error.remedy


def test_a_folder_that_is_gone_takes_no_policy_away(files: Files) -> None:
    files.policy("one")
    before = files.load()
    (files.folder / "policies").rename(files.folder / "elsewhere")
    after = files.reload(before)
    assert guests(after) == ["one"]
    assert refused(after) == [("policies", None, True)]
