"""Serving disks of the replica over NBD, with a cache here, in a process of its own for each environment."""
