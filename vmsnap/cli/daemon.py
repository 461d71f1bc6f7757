"""``vmsnap daemon``."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

import typer

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import daemon_document


def daemon(ctx: typer.Context, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Do by itself what the policies say: back up, prune, verify, end test VMs. Until it is stopped.

    It backs up what is due as 'vmsnap run --due' does, undoes what dead runs left, removes environments whose time has come,
    applies retention and re-reads snapshots. It stays in the foreground and logs on stderr: systemd/vmsnap.service runs it.

    SIGTERM stops it: runs that go on finish or are undone. SIGHUP makes it read its configuration again; files that are
    wrong are refused, named in the log and in 'systemctl status', and what they said before stays.

    The exit code is 0 after a stop, 2 where vmsnap.toml cannot be used, 4 where another daemon runs, 8 where something did
    not end in time. With --json, one document at the end says how many backups succeeded and failed.

    For example:

        vmsnap daemon
        systemctl reload vmsnap
    """
    session = begin(ctx, json=json, config=config)
    from vmsnap.bootstrap import make_world, open_observers  # noqa: PLC0415 - loads the drivers
    from vmsnap.daemon.logs import set_up_logging  # noqa: PLC0415
    from vmsnap.daemon.notify import Systemd  # noqa: PLC0415
    from vmsnap.daemon.service import Daemon  # noqa: PLC0415
    from vmsnap.model.history import Trigger  # noqa: PLC0415

    level = logging.DEBUG if session.debug else logging.INFO
    set_up_logging(sys.stderr, level=level, environment=os.environ)
    systemd = Systemd(os.environ)
    open_world = partial(make_world, trigger=Trigger.DAEMON)
    report = Daemon(session.config, open_world=open_world, open_observers=open_observers, systemd=systemd).run()
    if session.json:
        session.show(daemon_document(report), human=lambda _console: None)
