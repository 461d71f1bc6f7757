"""Set-up for all tests that need neither root nor a network."""

from __future__ import annotations

import pytest
from hypothesis import settings

# A slow machine is no failure; an example that takes long is found by the suite's own time.
settings.register_profile("vmsnap", deadline=None)
settings.load_profile("vmsnap")

pytest.register_assert_rewrite("vmsnap.testing")
