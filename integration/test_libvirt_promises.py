"""A real guest that does not converge, under what a policy promises of its pause: given up, slowed down, let be."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import libvirt
import pytest

from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import (
    DEADLINE,
    PATIENT,
    Cancel,
    capture_job_runs,
    definitions,
    is_running,
    memory_writer,
    run_of,
)
from vmsnap.errors import NotConvergingError, PreconditionError, VmsnapError
from vmsnap.hypervisors.libvirt import preflight, vcpulimits
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.model.capture import CaptureSettings, OnNoConvergence

_NEVER = 10**6


def converging(monkeypatch: pytest.MonkeyPatch, *, downtime_ms: int, gives_up: bool) -> None:
    """Allow one downtime and no other; give up at the first pass or never. How fast a busy host copies must not matter."""
    decider = Convergence(
        ceiling_ms=downtime_ms,
        downtime_ms=downtime_ms,
        raised_at_pass=-_NEVER if gives_up else _NEVER,
        raised_at=-_NEVER,
    )
    monkeypatch.setattr(Convergence, "for_plan", staticmethod(lambda _plan: decider))


def fails(lab: Lab, guest: LabGuest, settings: CaptureSettings, *, cancel: Cancel | None = None) -> VmsnapError | None:
    """Capture, and expect that the guest runs on its own disks afterwards; returns why it was given up, if it was."""
    before = definitions(guest), guest.domain.migrateGetMaxDowntime()
    failure = None
    with run_of(lab, guest, settings) as run:
        run.prepare()
        try:
            run.capture(cancel)
        except VmsnapError as error:
            failure = error
        else:
            run.driver.release(run.driver.memory_resource(run.plan), deadline=DEADLINE)
        run.release()
    assert (definitions(guest), guest.domain.migrateGetMaxDowntime()) == before
    return failure


def test_promises_to_a_guest_that_rewrites_its_memory(
    lab: Lab, guest: LabGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = vcpulimits.find_limits(guest.name)
    patient = replace(PATIENT, allow_emulation=True)
    with memory_writer(guest):
        # Slowed down while it does not converge, for a while, and given back.
        converging(monkeypatch, downtime_ms=1, gives_up=True)
        lowest: list[vcpulimits.VcpuLimit] = []

        def look() -> bool:
            lowest.extend(now for limit in limits if (now := vcpulimits.read_limit(limit.group)).is_lower_than(limit))
            return False

        throttled = replace(
            patient, on_no_convergence=OnNoConvergence.THROTTLE, throttle_limit=timedelta(milliseconds=500)
        )
        failure = fails(lab, guest, throttled, cancel=Cancel(when=look))
        assert lowest
        assert vcpulimits.find_limits(guest.name) == limits
        # It may converge when it is slow enough.
        assert failure is None or (isinstance(failure, NotConvergingError) and "slowed down" in failure.brief)

        # It does not stand still for longer than promised while its memory is copied.
        converging(monkeypatch, downtime_ms=60_000, gives_up=False)
        hasty = replace(patient, max_pause=timedelta(milliseconds=1))
        failure = fails(lab, guest, hasty)
        # On a fast host the rest is copied before it can be aborted; then nothing is lost by keeping it.
        assert failure is None or "stood still" in failure.brief
        assert is_running(guest)

        # A stream that outgrows its place ends the capture, not the host.
        converging(monkeypatch, downtime_ms=1, gives_up=False)
        with monkeypatch.context() as small:
            small.setattr(preflight, "memory_image_bytes", lambda ram_bytes, **_settings: ram_bytes // 4)
            failure = fails(lab, guest, patient)
        assert isinstance(failure, NotConvergingError)
        assert "outgrew" in failure.brief
        assert is_running(guest)

        # Whom its operator suspends meanwhile stays suspended.
        suspended: list[bool] = []

        def suspend() -> bool:
            if not suspended and capture_job_runs(guest):
                guest.domain.suspend()
                suspended.append(True)
            return False

        try:
            failure = fails(lab, guest, patient, cancel=Cancel(when=suspend))
            assert isinstance(failure, PreconditionError)
            assert "suspended it again" in failure.brief
            # As an operator suspends: no later run, and no clean-up, lets it go on.
            assert guest.domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]
        finally:
            with suppress(libvirt.libvirtError):
                guest.domain.resume()
    assert is_running(guest)
