"""The book of policies: one TOML file a guest, in one folder.

A file's name without ``.toml`` is the guest's name unless the file has a key ``guest``. A file that is broken stops its own
guest and no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmsnap.config.problems import nearest, validate
from vmsnap.config.toml import TomlFile, read_toml, refuse_if_open
from vmsnap.errors import ConfigError, PreconditionError
from vmsnap.model.policy import Policy

_SUFFIX = ".toml"


@dataclass(frozen=True, kw_only=True)
class PolicyCheck:
    """What is known of one policy file: its policy, or what is wrong with it. ``guest`` None: it cannot be told."""

    path: Path
    guest: str | None
    policy: Policy | None = None
    error: ConfigError | None = None


class PolicyBook:
    """The policies in a folder. Files are read anew at each call, so that a change counts at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Return the folder of the policy files."""
        return self._folder

    def get(self, guest: str) -> Policy:
        """Return a guest's policy.

        Raises ConfigError where its file is wrong, PreconditionError where there is none: it names the nearest one.
        """
        checks = self.check()
        for check in checks:
            if check.guest == guest:
                if check.error is not None:
                    raise check.error
                if check.policy is not None:
                    return check.policy
        raise self._no_policy(guest, checks=checks)

    def find(self, guest: str) -> Policy | None:
        """Return a guest's policy as it is now; None where there is none any more. Raises ConfigError where it is wrong."""
        try:
            return self.get(guest)
        except PreconditionError:
            return None

    def check(self) -> tuple[PolicyCheck, ...]:
        """Look at every file, by name. Raises ConfigError only where the folder itself cannot be used."""
        checks: list[PolicyCheck] = []
        first_of: dict[str, Path] = {}
        for path in self._files():
            check = _check(path)
            if check.guest is not None:
                first = first_of.setdefault(check.guest, path)
                if first != path and check.error is None:
                    check = PolicyCheck(path=path, guest=check.guest, error=_twice(check.guest, first=first, path=path))
            checks.append(check)
        twice = {check.guest: check.error for check in checks if check.error and check.guest in first_of}
        # The first of two files for one guest is as wrong as the second: nobody can tell which one was meant.
        return tuple(
            PolicyCheck(path=check.path, guest=check.guest, error=twice[check.guest])
            if check.error is None and check.guest in twice
            else check
            for check in checks
        )

    def _files(self) -> Iterator[Path]:
        remedy = f"make it (mkdir '{self._folder}') and put a file GUEST.toml in it, or set 'policies' in vmsnap.toml"
        try:
            refuse_if_open(self._folder, mode=self._folder.stat().st_mode)
            paths = sorted(self._folder.iterdir())
        except FileNotFoundError as error:
            raise ConfigError(f"there is no policy folder '{self._folder}'", remedy=remedy) from error
        except NotADirectoryError as error:
            raise ConfigError(f"'{self._folder}' is no folder", remedy=remedy) from error
        except OSError as error:
            raise ConfigError(
                f"cannot read the policy folder '{self._folder}': {error.strerror}", remedy="run vmsnap as root"
            ) from error
        return (path for path in paths if path.suffix == _SUFFIX and not path.name.startswith("."))

    def _no_policy(self, guest: str, *, checks: tuple[PolicyCheck, ...]) -> PreconditionError:
        known = sorted({check.guest for check in checks if check.guest is not None})
        unknown = [str(check.path) for check in checks if check.guest is None]
        meant = nearest(guest, known=known)
        details = [f"guests with a policy: {', '.join(known)}" if known else "no guest has a policy yet"]
        if unknown:
            details.append(f"files whose guest cannot be told: {', '.join(unknown)}")
        write = f"write '{self._folder}/GUEST.toml' for it (an empty file takes every default)"
        return PreconditionError(
            f"guest '{guest}' has no policy",
            details="\n".join(details),
            remedy=f"did you mean '{meant}'? Otherwise {write}" if meant else write,
        )


def _check(path: Path) -> PolicyCheck:
    stem = path.name.removesuffix(_SUFFIX)
    guest = stem if _can_be_guest(stem) else None
    try:
        file = read_toml(path, remedy_if_missing="it was there a moment ago: try again")
        given = file.data.get("guest")
        if isinstance(given, str) and given:
            guest = given
        policy = _policy(file, guest=guest)
    except ConfigError as error:
        return PolicyCheck(path=path, guest=guest, error=error)
    return PolicyCheck(path=path, guest=policy.guest, policy=policy)


def _policy(file: TomlFile, *, guest: str | None) -> Policy:
    if guest is None and "guest" not in file.data:
        raise ConfigError(
            f"{str(file.path)!r}: the file's name cannot be a guest's name",
            remedy='name the guest in the file\'s first line: guest = "NAME"',
        )
    return validate(Policy, file, data={"guest": guest, **file.data})


def _can_be_guest(stem: str) -> bool:
    """Tell whether a file's name is plainly a guest's: printable, no blanks at its ends, no escaped bytes."""
    return bool(stem) and stem.isprintable() and stem == stem.strip() and "%" not in stem


def _twice(guest: str, *, first: Path, path: Path) -> ConfigError:
    return ConfigError(
        f"two files are for guest '{guest}': '{first}' and '{path}'", remedy="keep one, or name another guest in one"
    )
