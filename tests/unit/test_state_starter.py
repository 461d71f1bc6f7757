from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from vmsnap.model.history import Starter, Trigger
from vmsnap.state.starter import starter_of_process

COMMAND = ["vmsnap", "backup", "two words"]
SPOKEN = "vmsnap backup 'two words'"
NOBODY = "4294967295"
SERVICE = "0::/system.slice/system-vmsnap\\x2dbackup.slice/vmsnap-backup@db.service\n"


def started(
    folder: Path,
    *,
    login: str | None = NOBODY,
    groups: str | None = "0::/\n",
    environ: Mapping[str, str] | None = None,
    trigger: Trigger | None = None,
) -> Starter:
    for name, content in (("loginuid", login), ("cgroup", groups)):
        if content is not None:
            (folder / name).write_text(content)
    return starter_of_process(trigger, environ=environ or {}, command=COMMAND, proc=folder)


def test_a_login_is_the_operator_even_below_sudo(tmp_path: Path) -> None:
    found = started(tmp_path, login="0", environ={"SUDO_USER": "mallory", "INVOCATION_ID": "x"}, groups=SERVICE)
    assert found == Starter(trigger=Trigger.OPERATOR, user="root", detail=SPOKEN)


def test_a_login_of_nobody_known_is_a_number(tmp_path: Path) -> None:
    assert started(tmp_path, login="3999999999").user == "3999999999"


def test_sudo_tells_where_the_kernel_does_not(tmp_path: Path) -> None:
    found = started(tmp_path, login=None, groups=None, environ={"SUDO_USER": "alice"})
    assert found == Starter(trigger=Trigger.OPERATOR, user="alice", detail=SPOKEN)


def test_a_unit_of_systemd_is_the_timer(tmp_path: Path) -> None:
    found = started(tmp_path, groups=SERVICE, environ={"INVOCATION_ID": "x"})
    assert found == Starter(trigger=Trigger.TIMER, detail="vmsnap-backup@db.service")


def test_something_below_another_service_is_not_the_timer(tmp_path: Path) -> None:
    found = started(tmp_path, groups="0::/system.slice/cron.service\n")
    assert found.trigger is Trigger.OTHER
    assert found.detail == SPOKEN
    assert found.user


def test_the_daemon_says_so_itself(tmp_path: Path) -> None:
    found = started(tmp_path, login="0", groups="0::/system.slice/vmsnap.service\n", trigger=Trigger.DAEMON)
    assert found == Starter(trigger=Trigger.DAEMON, detail="vmsnap.service")


@pytest.mark.parametrize("content", ["", "no number", "-1"])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, content: str) -> None:
    assert started(tmp_path, login=content, groups=None).detail


def test_of_this_process_something_is_known() -> None:
    assert starter_of_process().detail
