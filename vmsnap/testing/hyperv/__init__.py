"""A Hyper-V host on Linux, for tests: the wire that PowerShell remoting speaks, the host behind it, the scripts' twins.

``machine.HyperVHost`` has one method for each cmdlet that vmsnap's scripts use. What it does is what Microsoft documents or
what users measured; where nobody wrote it down, the stricter of the likely behaviours was taken, and a comment says so.
"""
