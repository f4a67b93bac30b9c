"""Promotion: a new version goes live if its owner's held-out loss isn't worse than that of the version that is served.

Put, then marked: between the two a crash leaves a version whose notes name the job, which is found when the job is settled again.
"""

import math
from collections.abc import Mapping
from typing import Any

from ...errors import StoreError, UnknownName
from ...store import Store
from .jobs import Job
from .learning import Learning
from .runs import Entry

NOTE = "job"


def settle(learning: Learning, job: Job, entry: Entry, result: Mapping[str, Any], staged: Store) -> None:
    """Ends a job whose adapter has trained: the version goes live, or the job fails and what is served stays.

    result: the fleet's line about it. Settled again, or after it was cancelled or deleted, nothing happens.
    """
    with learning.records.lock(job.name):
        if learning.jobs.has_ended(job):
            return
        number = version_of(learning.store, job)
        if number is None:
            if (why := _refusal(learning.store, job, entry, result)) is not None:
                learning.jobs.end(job, "failed", why[1], why[0], trained_tokens=result["tokens"], metrics=_losses(result))
                return
            number = learning.store.put(job.name, staged.get(job.name), _notes(job, entry, result))
        metrics = {**_losses(result), "version": number}
        message = f"Version {number} is live: held-out loss {result['loss_before']:.4f} -> {result['loss_after']:.4f}."
        learning.jobs.end(job, "succeeded", message, trained_tokens=result["tokens"], metrics=metrics, version=number)


def version_of(store: Store, job: Job) -> int | None:
    """The version that this job made; None where it made none. A rollback's copy has a greater number."""
    try:
        try:
            versions = store.versions(job.name)
        except StoreError:  # an earlier one is damaged; what a crash left unmarked is the current one
            versions = [store.latest(job.name)]
        return next((v.number for v in versions if v.notes.get(NOTE) == job.id), None)
    except UnknownName:
        return None


def _refusal(store: Store, job: Job, entry: Entry, result: Mapping[str, Any]) -> tuple[str, str] | None:
    """(code, message) where the version doesn't go live."""
    before, after = result["loss_before"], result["loss_after"]
    if result["status"] == "diverged":
        return "diverged", "Training diverged: a gradient wasn't finite. Lower learning_rate_multiplier. Nothing went live."
    if not result["held_out"]:
        return "nothing_held_out", "No row was left to measure by: give more rows, or a validation_file. Nothing went live."
    if finite(before) is None or finite(after) is None:
        return "not_measured", f"The loss of the held-out rows isn't finite: {before} -> {after}. Nothing went live."
    if after > before:
        compared = "the base model's" if job.start is None else f'that of "{job.start}"'
        compared = compared if entry.version is None else f"that of version {entry.version}, which stays live"
        return "not_better", f"The held-out loss is {after:.4f}, worse than {compared}: {before:.4f}."
    try:
        if repr(store.stamp(entry.name)) == entry.served:
            return None
        latest = store.latest(entry.name)
    except UnknownName:
        gone = "model_deleted", "The model was deleted while this version of it trained."
        return None if entry.served is None else gone
    if entry.milliseconds is not None and (latest.number, latest.milliseconds) == (entry.version, entry.milliseconds):
        return None  # the same version: a packed store that is compacted moves it, which changes its stamp
    return "superseded", "Another version went live while this one trained, and they weren't compared. Create the job again."


def finite(loss: float | None) -> float | None:
    """The loss, or None where it is no finite number, which JSON has no word for."""
    return loss if loss is not None and math.isfinite(loss) else None


def _losses(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "held_out_loss": finite(result["loss_after"]),
        "held_out_loss_before": finite(result["loss_before"]),
        "held_out_examples": result["held_out"],
        "examples": result["examples"],
        "steps": result["steps"],
    }


def _notes(job: Job, entry: Entry, result: Mapping[str, Any]) -> dict[str, str]:
    """What the store keeps with the version: strings, for whoever rolls back."""
    notes = {NOTE: job.id, "training_file": job.training_file, "examples": result["examples"], "held_out": result["held_out"]}
    notes |= {"loss_before": f"{result['loss_before']:.6g}", "loss_after": f"{result['loss_after']:.6g}"}
    notes |= {"went_on_from": job.start or (f"version {entry.version}" if entry.version is not None else "base")}
    return {name: str(value) for name, value in notes.items()}
