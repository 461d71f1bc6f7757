"""Secrets, from files or systemd credentials that only their owner may read: where notifications go, keys, accounts."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from string import hexdigits
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from vmsnap.config.problems import validate
from vmsnap.config.settings import HypervSettings, NotificationSettings, ReplicaSettings
from vmsnap.config.toml import read_toml
from vmsnap.errors import ConfigError
from vmsnap.model.objects import S3Keys

_WRITE_ACCOUNT = 'write it (user = "...", password = "...")'
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
"""Set by systemd for units with LoadCredential= or LoadCredentialEncrypted= (systemd.exec(5))."""


SecretText = Annotated[SecretStr, Field(min_length=1)]


class _SecretFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Addresses(_SecretFile):
    urls: tuple[SecretStr, ...] = ()
    dead_man_url: SecretStr | None = None


class _S3File(_SecretFile):
    access_key: SecretText
    secret_key: SecretText
    session_token: SecretText | None = None


class _EncryptionFile(_SecretFile):
    encryption_key: SecretStr


class _AccountFile(_SecretFile):
    user: str = Field(min_length=1)
    password: SecretText


class _GuestAccountsFile(_SecretFile):
    user: str | None = Field(default=None, min_length=1)
    password: SecretText | None = None
    guests: dict[str, _AccountFile] = Field(default_factory=dict)


FileT = TypeVar("FileT", bound=_SecretFile)


@dataclass(frozen=True, kw_only=True)
class Addressees:
    """URLs to tell somebody by, and the one to ping. All are secrets, and shown by no ``repr``."""

    urls: tuple[str, ...] = field(default=(), repr=False)
    dead_man_url: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Account:
    """An account and its password, which no ``repr`` shows."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class GuestAccounts:
    """Accounts in guests: one for all, and those of single guests."""

    common: Account | None = None
    guests: dict[str, Account] = field(default_factory=dict)

    def of(self, guest: str) -> Account | None:
        """Return the account in a guest, or None where none is named."""
        return self.guests.get(guest, self.common)


def addressees_of(settings: NotificationSettings) -> Addressees:
    """Return who is told. Raises ConfigError where the credential cannot be read, or may be read by others."""
    given = [settings.urls]
    ping = settings.dead_man_url
    if settings.credential is not None:
        found = _read(
            _Addresses, settings.credential, key="notifications.credential", remedy='write it (urls = ["..."])'
        )
        given.append(found.urls)
        ping = ping or found.dead_man_url
    return Addressees(
        urls=tuple(url.get_secret_value() for urls in given for url in urls),
        dead_man_url=None if ping is None else ping.get_secret_value(),
    )


def s3_keys_of(settings: ReplicaSettings) -> S3Keys | None:
    """Return the keys of the replica's server as they are now; None: boto3 knows where to look.

    Raises ConfigError where the credential cannot be read, or may be read by others.
    """
    if settings.credential is None:
        return None
    remedy = 'write it (access_key = "...", secret_key = "...", and session_token where there is one)'
    found = _read(_S3File, settings.credential, key="replica.credential", remedy=remedy)
    token = found.session_token
    return S3Keys(
        access_key=found.access_key.get_secret_value(),
        secret_key=found.secret_key.get_secret_value(),
        session_token=None if token is None else token.get_secret_value(),
    )


def encryption_key_of(settings: ReplicaSettings) -> bytes | None:
    """Return the 32 bytes that encrypt the replica; None: it is not encrypted.

    Raises ConfigError where the credential cannot be read, may be read by others, or is no key.
    """
    if settings.encryption_credential is None:
        return None
    name = "replica.encryption_credential"
    remedy = "write it (encryption_key = \"...\", 64 hexadecimal digits as 'openssl rand -hex 32' prints them)"
    found = _read(_EncryptionFile, settings.encryption_credential, key=name, remedy=remedy)
    text = found.encryption_key.get_secret_value()
    if len(text) != 64 or not set(text) <= set(hexdigits):
        raise ConfigError(
            f"{name}: what '{settings.encryption_credential}' holds as encryption_key is no key",
            remedy="64 hexadecimal digits are allowed, as 'openssl rand -hex 32' prints them",
        )
    return bytes.fromhex(text)


def host_account_of(settings: HypervSettings) -> Account | None:
    """Return the account on a Hyper-V host; None: a certificate, or the ticket of this process, is enough.

    Raises ConfigError where the credential cannot be read, or may be read by others.
    """
    if settings.credential is None:
        return None
    found = _read(_AccountFile, settings.credential, key="hyperv.credential", remedy=_WRITE_ACCOUNT)
    return Account(user=found.user, password=found.password.get_secret_value())


def guest_accounts_of(settings: HypervSettings) -> GuestAccounts:
    """Return the accounts in the guests of a Hyper-V host. Raises ConfigError as ``host_account_of`` does."""
    if settings.guest_credential is None:
        return GuestAccounts()
    found = _read(_GuestAccountsFile, settings.guest_credential, key="hyperv.guest_credential", remedy=_WRITE_ACCOUNT)
    common = None
    if found.user is not None and found.password is not None:
        common = Account(user=found.user, password=found.password.get_secret_value())
    return GuestAccounts(
        common=common,
        guests={
            name: Account(user=account.user, password=account.password.get_secret_value())
            for name, account in found.guests.items()
        },
    )


def _read(model: type[FileT], credential: str, *, key: str, remedy: str) -> FileT:
    """Read the file of a credential that the setting ``key`` names."""
    path = _path(credential, key=key)
    if "/" in credential:
        _refuse_if_readable(path)  # systemd looks after its own
    file = read_toml(path, remedy_if_missing=f"{remedy}, with mode 0600")
    return validate(model, file, data=file.data)


def _path(credential: str, *, key: str) -> Path:
    """Return the file of a credential: itself, where it is a path; else that of the systemd credential of its name."""
    if "/" in credential:
        path = Path(credential)
        if not path.is_absolute():
            raise ConfigError(
                f"{key}: '{credential}' is neither an absolute path nor a name",
                remedy="give a path that begins with a slash, or the name of a credential of the unit",
            )
        return path
    folder = os.environ.get(CREDENTIALS_VARIABLE)
    if folder is None:
        raise ConfigError(
            f"{key}: this process was given no systemd credential '{credential}'",
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
