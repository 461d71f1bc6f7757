"""The book of environments: one JSON file each under ``STATE/environments``."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from vmsnap.errors import DriverError, EnvironmentNotFoundError, PreconditionError
from vmsnap.model.environment import Environment
from vmsnap.model.ids import RunId, SnapshotId, folder_name
from vmsnap.state.files import make_private_folder, remove_if_there, translated, write_new, write_replace

FORMAT_VERSION = 1


class FileEnvironmentBook:
    """The port ``EnvironmentBook``. Each change is on disk, whole, when its method returns."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "environments"

    def add(self, environment: Environment) -> None:
        """Record an environment. Raises PreconditionError where the name is taken."""
        make_private_folder(self._folder)
        try:
            write_new(self._path(environment.name), data=_encode(environment))
        except FileExistsError as error:
            raise name_taken(environment.name) from error

    def replace(self, environment: Environment) -> None:
        """Record a change of an environment. Raises EnvironmentNotFoundError where there is none of that name."""
        self.get(environment.name)
        write_replace(self._path(environment.name), data=_encode(environment))

    def remove(self, name: str) -> None:
        """Forget an environment. Content where it is not there."""
        remove_if_there(self._path(name))

    def get(self, name: str) -> Environment:
        """Return an environment. Raises EnvironmentNotFoundError, which lists those that exist."""
        path = self._path(name)
        try:
            with translated(doing="read", path=path):
                return _decode(path)
        except DriverError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise no_such_environment(name, existing=self.all()) from error
            raise

    def all(self) -> tuple[Environment, ...]:
        """Return all environments, by name."""
        with translated(doing="read", path=self._folder):
            try:
                paths = [path for path in self._folder.iterdir() if path.suffix == ".json" and path.name[0] != "."]
            except FileNotFoundError:
                return ()
        found = []
        for path in paths:
            try:
                with translated(doing="read", path=path):
                    found.append(_decode(path))
            except DriverError as error:
                if not isinstance(error.__cause__, FileNotFoundError):  # destroyed while we looked
                    raise
        return tuple(sorted(found, key=lambda environment: environment.name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{folder_name(name)}.json"


def name_taken(name: str) -> PreconditionError:
    """Return the error for an environment's name that exists."""
    return PreconditionError(
        f"an environment '{name}' exists already",
        remedy=f"choose another --name, or run 'vmsnap env destroy {name}' first",
    )


def no_such_environment(name: str, *, existing: tuple[Environment, ...]) -> EnvironmentNotFoundError:
    """Return the error for an unknown environment; it lists those that exist."""
    names = ", ".join(f"'{environment.name}'" for environment in existing)
    return EnvironmentNotFoundError(
        f"there is no environment '{name}'",
        remedy=f"environments that exist: {names}" if names else "no environment exists; 'vmsnap provision' makes one",
    )


def _encode(environment: Environment) -> bytes:
    record = {
        "version": FORMAT_VERSION,
        "name": environment.name,
        "run": environment.run,
        "guest": environment.guest,
        "snapshot": environment.snapshot,
        "created": environment.created.isoformat(),
        "expires": environment.expires.isoformat() if environment.expires else None,
        "network": environment.network,
    }
    return (json.dumps(record, indent=2) + "\n").encode()


def _decode(path: Path) -> Environment:
    try:
        record = json.loads(path.read_bytes())
        if record["version"] != FORMAT_VERSION:
            raise PreconditionError(
                f"'{path}' has format {record['version']}, this vmsnap knows {FORMAT_VERSION}",
                remedy="use the vmsnap that wrote it, or a newer one",
            )
        return Environment(
            name=record["name"],
            run=RunId(record["run"]),
            guest=record["guest"],
            snapshot=SnapshotId(record["snapshot"]),
            created=datetime.fromisoformat(record["created"]),
            expires=datetime.fromisoformat(record["expires"]) if record["expires"] else None,
            network=record["network"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DriverError(
            f"'{path}' is damaged and describes no environment",
            details=str(error),
            remedy="move the file away; then 'vmsnap reconcile' and the hypervisor's list show what is left of it",
        ) from error
