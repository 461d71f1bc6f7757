"""A Hyper-V host on Linux, for tests: a WinRM endpoint that unmodified clients talk to, and what lies behind it."""
