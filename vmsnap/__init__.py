"""vmsnap: clean database backups by cloning running VMs."""

__version__ = "0.1.0"
