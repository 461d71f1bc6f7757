"""A store of images after kill -9 at every step, with whole copies."""

from __future__ import annotations

from vmsnap.testing.store_crashes import StoreCrashes


class TestCrashesWithCopies(StoreCrashes):
    pass
