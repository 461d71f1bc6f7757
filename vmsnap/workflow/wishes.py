"""What a policy wants of a capture and of its clone."""

from __future__ import annotations

from vmsnap.model.capture import CaptureSettings, CloneLimits, StorageCommands
from vmsnap.model.policy import ClonePolicy, Policy

_MIB = 1 << 20


def settings_of(policy: Policy) -> CaptureSettings:
    """Return what a policy wants of the capture."""
    storage = policy.capture.storage
    return CaptureSettings(
        mode=policy.capture.mode,
        max_pause=policy.capture.max_pause,
        on_no_convergence=policy.capture.on_no_convergence,
        throttle_limit=policy.capture.throttle_limit,
        timeout=policy.capture.timeout,
        detach=policy.capture.detach,
        disk_snapshot=policy.capture.disk_snapshot,
        storage=None if storage is None else StorageCommands(**storage.model_dump()),
        storage_timeout=policy.capture.storage_timeout,
        overlay_dir=policy.capture.overlay_dir,
        min_overlay_free_bytes=policy.capture.min_overlay_free_mib * _MIB,
        allow_emulation=policy.capture.allow_emulation,
        swap=policy.capture.swap,
        cpu_shares=policy.clone.cpu_shares,
        limits=_limits_of(policy.clone),
        boot_memory_bytes=None if policy.clone.boot_memory_mib is None else policy.clone.boot_memory_mib * _MIB,
    )


def _limits_of(policy: ClonePolicy) -> CloneLimits:
    return CloneLimits(
        cpu_percent=policy.cpu_percent,
        disk_bytes_per_second=None if policy.disk_mib_s is None else policy.disk_mib_s * _MIB,
        disk_operations_per_second=policy.disk_iops,
        network_bytes_per_second=None if policy.network_mib_s is None else policy.network_mib_s * _MIB,
    )
