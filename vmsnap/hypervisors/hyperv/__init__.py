"""Hyper-V over PowerShell remoting: the only code that knows Hyper-V."""
