"""Where notifications go: URLs from ``vmsnap.toml``, and from a file or a systemd credential that only its owner may read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr

from vmsnap.config.problems import validate
from vmsnap.config.settings import NotificationSettings
from vmsnap.config.toml import read_toml
from vmsnap.errors import ConfigError

CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
"""Set by systemd for units with LoadCredential= or LoadCredentialEncrypted= (systemd.exec(5))."""


class _CredentialFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    urls: tuple[SecretStr, ...] = ()
    dead_man_url: SecretStr | None = None


@dataclass(frozen=True, kw_only=True)
class Addressees:
    """URLs to tell somebody by, and the one to ping. All are secrets, and shown by no ``repr``."""

    urls: tuple[str, ...] = field(default=(), repr=False)
    dead_man_url: str | None = field(default=None, repr=False)


def addressees_of(settings: NotificationSettings) -> Addressees:
    """Return who is told. Raises ConfigError where the credential cannot be read, or may be read by others."""
    given = [settings.urls]
    ping = settings.dead_man_url
    if settings.credential is not None:
        path = _path(settings.credential)
        if "/" in settings.credential:
            _refuse_if_readable(path)  # systemd looks after its own
        file = read_toml(path, remedy_if_missing='write it (urls = ["..."]), with mode 0600')
        found = validate(_CredentialFile, file, data=file.data)
        given.append(found.urls)
        ping = ping or found.dead_man_url
    return Addressees(
        urls=tuple(url.get_secret_value() for urls in given for url in urls),
        dead_man_url=None if ping is None else ping.get_secret_value(),
    )


def _path(credential: str) -> Path:
    """Return the file of a credential: itself, where it is a path; else that of the systemd credential of its name."""
    if "/" in credential:
        path = Path(credential)
        if not path.is_absolute():
            raise ConfigError(
                f"notifications.credential: '{credential}' is neither an absolute path nor a name",
                remedy="give a path that begins with a slash, or the name of a credential of the unit",
            )
        return path
    folder = os.environ.get(CREDENTIALS_VARIABLE)
    if folder is None:
        raise ConfigError(
            f"notifications.credential: this process was given no systemd credential '{credential}'",
            remedy=f"set LoadCredential={credential}:/PATH in the unit; a command in a shell can only use an absolute path",
        )
    return Path(folder) / credential


def _refuse_if_readable(path: Path) -> None:
    """Raise ConfigError where others than its owner may read a file. What is missing is told by whoever reads it."""
    try:
        status = path.stat()
    except OSError:
        return
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            f"'{path}' holds secrets, and others may read it (mode {stat.S_IMODE(status.st_mode):04o}, "
            f"owner {status.st_uid})",
            remedy=f"run: chmod 600 '{path}', and chown it to the user of vmsnap",
        )
