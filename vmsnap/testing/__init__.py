"""Fakes and contract test suites for authors of drivers. Production code never imports it."""
