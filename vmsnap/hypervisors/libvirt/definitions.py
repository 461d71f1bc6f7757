"""Making libvirt's files of domains durable.

libvirt writes a definition anew beside the old one, flushes it and renames it (``virFileRewrite``), but does not flush the
folder: after a power cut the old one may be there again, and name a disk that the guest had left.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

_LOG = logging.getLogger(__name__)
FOLDER = Path("/etc/libvirt/qemu")


def settle(folder: Path = FOLDER) -> None:
    """Have the definitions of all domains, as libvirt wrote them last, survive a power cut. May be repeated.

    Where libvirt keeps them elsewhere nothing is done.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        _LOG.debug("%s: %s", folder, error)
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        _LOG.warning("%s could not be flushed: %s", folder, error.strerror)
    finally:
        os.close(descriptor)
