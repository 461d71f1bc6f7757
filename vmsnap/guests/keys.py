"""Reading private SSH keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from paramiko.pkey import UnknownKeyType

from vmsnap.errors import ConfigError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def load_key(path: Path) -> paramiko.PKey:
    """Return the private key in a file. Raises ConfigError with what is wrong with it."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            f"cannot read the SSH key {path}: {error.strerror}", remedy="correct key_file in the policy's [control.ssh]"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the SSH key {path} is no file", remedy="correct key_file in the policy's [control.ssh]")
    if status.st_uid not in {0, os.geteuid()}:
        raise ConfigError(f"the SSH key {path} belongs to another user", remedy=f"chown root {path}")
    if status.st_mode & _OTHERS:
        raise ConfigError(f"others may read or change the SSH key {path}", remedy=f"chmod 600 {path}")
    try:
        return paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError) as error:
        # TypeError is cryptography's way to say that a passphrase is missing.
        raise ConfigError(
            f"the SSH key {path} needs a passphrase, and nobody is there to type it",
            remedy="use a key without one: ssh-keygen -t ed25519 -N '' -f FILE",
        ) from error
    except (paramiko.SSHException, UnknownKeyType, ValueError, OSError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} holds no private SSH key that can be used",
            details=type(error).__name__,
            remedy="make one: ssh-keygen -t ed25519 -N '' -f FILE",
        ) from error
