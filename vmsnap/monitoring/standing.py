"""What is wrong by chores at this moment. A problem lasts as long as passes of its chore raise it."""

from __future__ import annotations

from collections.abc import Mapping

from vmsnap.errors import StoreUnreachableError, VmsnapError
from vmsnap.model.facts import Problem, chore_problem
from vmsnap.ports.observer import ChoreDone

_Key = tuple[str, str]
_Errors = dict[str, VmsnapError]
_MOST_NAMES = 3


class Standing:
    """The problems of all chores, by chore and guest. For one thread."""

    def __init__(self) -> None:
        self._standing: dict[_Key, _Errors] = {}
        self._raised: dict[_Key, _Errors] = {}
        self._heard: set[str] = set()

    @property
    def heard(self) -> frozenset[str]:
        """Return the chores that had a whole pass: all of their problems are known."""
        return frozenset(self._heard)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Return what is wrong, as far as known: what the pass that goes on has found, and what was so before it."""
        return tuple(
            chore_problem(name, guest=guest, error=next(iter(errors.values())))
            for (name, guest), errors in sorted({**self._standing, **self._raised}.items())
        )

    def hear(self, done: ChoreDone) -> bool:
        """Take what a chore says; tell whether it is an error that is new.

        At the end of a whole pass, problems of that chore which it did not raise are over. A pass that was cut says nothing of
        what it did not come to.
        """
        is_new = False
        if done.error is not None:
            key, brief = (done.name, done.guest or ""), done.error.brief
            is_new = all(brief not in errors.get(key, {}) for errors in (self._standing, self._raised))
            self._raised.setdefault(key, {}).setdefault(brief, done.error)
        if done.guest is None:
            self._end(done.name, whole=done.whole)
        return is_new

    def _end(self, name: str, *, whole: bool) -> None:
        if whole:
            self._heard.add(name)
            self._standing = {key: errors for key, errors in self._standing.items() if key[0] != name}
        for key in [key for key in self._raised if key[0] == name]:
            self._standing[key] = self._raised.pop(key)


def unreachable(away: Mapping[str, VmsnapError]) -> StoreUnreachableError:
    """Return what is to be told of a replica that does not answer, once for all guests. ``away``: the errors, by guest."""
    guests = sorted(away)
    first = away[guests[0]]
    more = f" and {len(guests) - _MOST_NAMES} more" if len(guests) > _MOST_NAMES else ""
    whom = f"{len(guests)} guests: " if len(guests) > 1 else "guest "
    return StoreUnreachableError(
        f"{first.brief} ({whom}{', '.join(guests[:_MOST_NAMES])}{more})",
        details=first.details,
        remedy=first.remedy,
    )
