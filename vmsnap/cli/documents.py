"""The JSON documents that commands print. Their names are an interface: scripts depend on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsnap.cli.failures import error_fields

if TYPE_CHECKING:
    from vmsnap.config.policies import PolicyCheck
    from vmsnap.model.collection import CollectReport
    from vmsnap.model.copies import ReplicaCopies
    from vmsnap.model.due import DueEntry, DueReport, ForecastReport, PruneReport
    from vmsnap.model.environment import Expiry
    from vmsnap.model.forgetting import ForgetReport
    from vmsnap.model.guest import Finding
    from vmsnap.model.history import AuditEntry, RunEntry, Starter
    from vmsnap.model.manifest import CleanRecord, DrainRecord, Snapshot
    from vmsnap.model.report import (
        BackupReport,
        DaemonReport,
        EnvironmentStatus,
        ExportReport,
        ProvisionReport,
        ReconcileReport,
        ReplicateReport,
        RestoreReport,
        VerifyReport,
    )
    from vmsnap.model.schedule import Due
    from vmsnap.model.verification import VerifyEntry
    from vmsnap.monitoring.metrics import Metric

Document = dict[str, Any]


def backup_document(report: BackupReport) -> Document:
    """Return the document of ``vmsnap backup``: ``drain`` is added up over instances, which are listed beside it."""
    document = report.model_dump(mode="json")
    document["drain"] = _drain(report.drain)
    document["clean"] = {"engine": engine_names(report.clean), "evidence": report.clean.model_dump(mode="json")}
    return document


def engine_names(clean: CleanRecord) -> str:
    """Return the name of the database engine, or of each where a guest runs several."""
    return ", ".join(sorted({instance.engine for instance in clean.instances}))


def _drain(records: Sequence[DrainRecord]) -> Document:
    return {
        "engine": ", ".join(sorted({record.engine for record in records})),
        "in_flight_at_start": sum(record.in_flight_at_start for record in records),
        "finished": sum(record.finished for record in records),
        "rolled_back": sum(record.rolled_back for record in records),
        "seconds": round(sum(record.seconds for record in records), 3),
        "instances": [record.model_dump(mode="json") for record in records],
    }


def provision_document(report: ProvisionReport) -> Document:
    """Return the document of ``vmsnap provision``."""
    return report.model_dump(mode="json")


def snapshot_summary(snapshot: Snapshot, *, now: datetime) -> Document:
    """Return a snapshot as an entry of a list. ``pin`` may have ended; ``pinned`` says whether it holds at ``now``."""
    manifest = snapshot.manifest
    verification, pin = snapshot.marks.verification, snapshot.marks.pin
    return {
        "snapshot": snapshot.id,
        "guest": manifest.guest,
        "captured": _iso(manifest.captured),
        "logical_bytes": manifest.store.logical_bytes,
        "new_bytes": manifest.store.new_bytes,
        "mode": manifest.capture.mode.value,
        "memory_captured": manifest.capture.memory_captured,
        "pause_ms": manifest.capture.pause_ms,
        "engine": engine_names(manifest.clean),
        "clean": {"proven": True, "methods": sorted({item.method for item in manifest.clean.instances})},
        "verified": None if verification is None else verification.model_dump(mode="json"),
        "pin": None if pin is None else pin.model_dump(mode="json"),
        "pinned": pin is not None and pin.holds(now),
        "parent": manifest.parent,
    }


def list_document(snapshots: Sequence[Snapshot], *, now: datetime, copies: ReplicaCopies | None = None) -> Document:
    """Return the document of ``vmsnap list``.

    ``copies`` of a snapshot: ``local``, ``replica``. Where there is a replica: ``replica_only`` are the snapshots that are there
    alone, and ``replica_error`` says why it could not be asked, or is null.
    """
    ids = frozenset() if copies is None else copies.ids
    document: Document = {
        "snapshots": [
            {**snapshot_summary(one, now=now), "copies": ["local", *(["replica"] if one.id in ids else [])]}
            for one in snapshots
        ]
    }
    if copies is not None and copies.replica:
        alone = copies.only_there(snapshots)
        document["replica_only"] = [{**snapshot_summary(one, now=now), "copies": ["replica"]} for one in alone]
        document["replica_error"] = None if copies.problem is None else error_fields(copies.problem)
    return document


def snapshot_document(snapshot: Snapshot, *, now: datetime) -> Document:
    """Return the document of ``vmsnap show``: the manifest and the marks, whole, and whether a pin holds it at ``now``."""
    pin = snapshot.marks.pin
    return {**snapshot.model_dump(mode="json"), "pinned": pin is not None and pin.holds(now)}


def prune_document(report: PruneReport, *, dry_run: bool, now: datetime) -> Document:
    """Return the document of ``vmsnap prune``."""
    return {
        "dry_run": dry_run,
        "decisions": [
            {
                **snapshot_summary(decision.snapshot, now=now),
                "keep": decision.keep,
                "reasons": list(decision.reasons),
                "rules": list(decision.rules),
                "removed_bytes": decision.removed_bytes,
                "place": decision.place.value,
            }
            for decision in report.decisions
        ],
        "failures": [{"guest": failure.guest, **error_fields(failure.error)} for failure in report.failures],
    }


def forget_document(report: ForgetReport, *, now: datetime) -> Document:
    """Return the document of ``vmsnap forget``.

    ``copy_stays``: whether the snapshot has another copy that stays; null: that is not known. ``confirm``: why the guest's name
    is asked for. ``replica_error`` says why the replica could not be asked, or is null.
    """
    return {
        "guest": report.guest,
        "dry_run": report.dry_run,
        "reason": report.reason,
        "snapshots": [
            {
                **snapshot_summary(entry.snapshot, now=now),
                "place": entry.place.value,
                "removed": not report.dry_run,
                "copy_stays": entry.copy_stays,
            }
            for entry in report.entries
        ],
        "freed_bytes": report.freed_bytes,
        "confirm": list(report.confirm),
        "replica_error": None if report.problem is None else error_fields(report.problem),
    }


def collect_document(report: CollectReport) -> Document:
    """Return the document of ``vmsnap gc``. ``waiting`` was found before, and cannot go yet: ``reasons`` say why."""
    document: Document = report.model_dump(mode="json")
    return document


def forecasts_document(report: ForecastReport) -> Document:
    """Return the document of ``vmsnap prune --simulate``.

    ``snapshot`` is null where it is an imagined one, ``every_seconds`` where backups are as scheduled.
    """
    return {
        "simulations": [
            {
                "guest": forecast.guest,
                "time_zone": forecast.time_zone,
                "from": _iso(forecast.start),
                "until": _iso(forecast.end),
                "every_seconds": None if forecast.every is None else forecast.every.total_seconds(),
                "backups": len(forecast.backups),
                "most_kept": forecast.most,
                "kept": [
                    {
                        "snapshot": None if verdict.candidate.id.startswith("+") else verdict.candidate.id,
                        "captured": _iso(verdict.candidate.captured),
                        "reasons": [reason.text for reason in verdict.reasons],
                        "rules": [reason.rule for reason in verdict.reasons],
                    }
                    for verdict in forecast.kept
                ],
            }
            for forecast in report.forecasts
        ],
        "failures": [{"guest": failure.guest, **error_fields(failure.error)} for failure in report.failures],
    }


def _iso(value: datetime) -> str:
    return value.isoformat().replace("+00:00", "Z")


def replicate_document(report: ReplicateReport) -> Document:
    """Return the document of ``vmsnap replicate``."""
    return report.model_dump(mode="json")


def restore_document(report: RestoreReport) -> Document:
    """Return the document of ``vmsnap restore``."""
    return report.model_dump(mode="json")


def export_document(report: ExportReport) -> Document:
    """Return the document of ``vmsnap export``."""
    return report.model_dump(mode="json")


def verify_document(report: VerifyReport) -> Document:
    """Return the document of ``vmsnap verify``."""
    return {**report.model_dump(mode="json"), "intact": not report.defects}


def verify_due_document(entries: Sequence[VerifyEntry]) -> Document:
    """Return the document of ``vmsnap verify --due``."""
    return {
        "snapshots": [
            {
                "guest": entry.guest,
                "snapshot": entry.snapshot,
                "report": None if entry.report is None else verify_document(entry.report),
                "error": None if entry.error is None else error_fields(entry.error),
            }
            for entry in entries
        ]
    }


def daemon_document(report: DaemonReport) -> Document:
    """Return the document of ``vmsnap daemon``."""
    return report.model_dump(mode="json")


def environment_document(status: EnvironmentStatus) -> Document:
    """Return one environment and how it is."""
    dumped = status.model_dump(mode="json")
    environment = dumped["environment"]
    return {
        "environment": environment.pop("name"),
        **environment,
        "state": dumped["state"],
        "overlay_bytes": dumped["overlay_bytes"],
        "service_address": dumped["service_address"],
        "dns_name": dumped["dns_name"],
        "export": dumped["export"],
    }


def environments_document(statuses: Sequence[EnvironmentStatus]) -> Document:
    """Return the document of ``vmsnap env list``."""
    return {"environments": [environment_document(status) for status in statuses]}


def expiry_document(entries: Sequence[Expiry], *, dry_run: bool) -> Document:
    """Return the document of ``vmsnap env expire``: one entry an environment whose time has come."""
    return {
        "dry_run": dry_run,
        "environments": [
            {
                "environment": entry.environment.name,
                "guest": entry.environment.guest,
                "snapshot": entry.environment.snapshot,
                "expires": None if entry.environment.expires is None else _iso(entry.environment.expires),
                "removed": entry.removed,
                "error": None if entry.error is None else error_fields(entry.error),
            }
            for entry in entries
        ],
    }


def reconcile_document(report: ReconcileReport) -> Document:
    """Return the document of ``vmsnap reconcile``."""
    return {**report.model_dump(mode="json"), "complete": report.complete}


def due_document(report: DueReport) -> Document:
    """Return the document of ``vmsnap run --due``: one entry a guest."""
    return {
        "started": report.started.isoformat().replace("+00:00", "Z"),
        "finished": report.finished.isoformat().replace("+00:00", "Z"),
        "dry_run": report.dry_run,
        "exit_code": int(report.exit_code),
        "guests": [_due_entry(entry) for entry in report.entries],
        "replicated": [
            {
                "guest": entry.guest,
                "snapshot": entry.snapshot,
                "report": None if entry.report is None else replicate_document(entry.report),
                "error": None if entry.error is None else error_fields(entry.error),
            }
            for entry in report.replicated
        ],
    }


def _due_entry(entry: DueEntry) -> Document:
    return {
        "guest": entry.guest,
        "result": entry.outcome.value,
        "due": due_fields(entry.due),
        "note": entry.note,
        "backup": None if entry.report is None else backup_document(entry.report),
        "error": None
        if entry.error is None
        else {
            **error_fields(entry.error),
            "also": [error_fields(other) for other in entry.error.also],
        },
        "next": due_fields(entry.following),
    }


def due_fields(due: Due | None) -> Document | None:
    """Return when a run is due, and why. ``at`` null: never."""
    if due is None:
        return None
    at = None if due.at is None else due.at.isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"at": at, "why": due.reason}


def history_document(runs: Sequence[RunEntry]) -> Document:
    """Return the document of ``vmsnap history``: runs, the newest first. ``exit_code`` null: it runs, or it died."""
    return {"runs": [_run_fields(entry) for entry in runs]}


def _run_fields(entry: RunEntry) -> Document:
    result = entry.result
    return {
        "run": entry.run,
        "kind": entry.kind.value,
        "guest": entry.guest,
        "outcome": entry.outcome.value,
        "started": _iso(entry.started),
        "ended": None if entry.ended is None else _iso(entry.ended),
        "seconds": entry.seconds,
        "by": _starter_fields(entry.starter),
        "exit_code": None if result is None else result.exit_code,
        "error": None if result is None else result.error,
        "remedy": None if result is None else result.remedy,
        "snapshot": None if result is None else result.snapshot,
        "environment": None if result is None else result.environment,
        "pause_ms": None if result is None else result.pause_ms,
        "new_bytes": None if result is None else result.new_bytes,
        "logical_bytes": None if result is None else result.logical_bytes,
        "warnings": [] if result is None else list(result.warnings),
        "steps": [
            {"name": step.name, "began_after_seconds": step.began_after_seconds, "seconds": step.seconds}
            for step in entry.steps
        ],
    }


def _starter_fields(starter: Starter) -> Document:
    return {"trigger": starter.trigger.value, "user": starter.user or None, "detail": starter.detail}


def audit_document(trail: Sequence[AuditEntry]) -> Document:
    """Return the document of ``vmsnap history --audit``: the newest first. ``failure`` null: it was done."""
    return {
        "audit": [
            {
                "at": _iso(entry.at),
                "action": entry.action.value,
                "guest": entry.guest or None,
                "subject": entry.subject,
                "detail": entry.detail,
                "failure": entry.failure,
                "by": _starter_fields(entry.starter),
            }
            for entry in trail
        ]
    }


def doctor_document(findings: Sequence[Finding], *, guest: str | None, ready: bool) -> Document:
    """Return the document of ``vmsnap doctor``."""
    return {
        "guest": guest,
        "ready": ready,
        "findings": [
            {
                "check": finding.check,
                "severity": finding.severity.value,
                "message": finding.message,
                "remedy": finding.remedy,
            }
            for finding in findings
        ],
    }


def policy_check_document(
    checks: Sequence[PolicyCheck], *, warnings: Mapping[Path, Sequence[str]], settings: Sequence[Finding]
) -> Document:
    """Return the document of ``vmsnap policy check``. ``settings``: what is to be said of vmsnap.toml."""
    return {
        "settings": {"warnings": [finding.message for finding in settings]},
        "files": [
            {
                "file": str(check.path),
                "guest": check.guest,
                "ok": check.error is None,
                "error": None if check.error is None else error_fields(check.error),
                "warnings": list(warnings.get(check.path, ())),
            }
            for check in checks
        ],
    }


def metrics_document(metrics: Sequence[Metric]) -> Document:
    """Return the document of ``vmsnap metrics``."""
    return {
        "metrics": [
            {
                "name": metric.name,
                "text": metric.text,
                "samples": [{"labels": dict(sample.labels), "value": sample.value} for sample in metric.samples],
            }
            for metric in metrics
        ]
    }
