"""Jobs, their events and checkpoints as OpenAI's clients know them."""

from __future__ import annotations

import math
import time
from datetime import datetime
from typing import Any

from loraplex import JobCheckpoint, JobEvent, JobState, TrainingJob

from loraplex_gateway.finetuning.labels import JobLabels
from loraplex_gateway.finetuning.names import checkpoint_model_id, job_id
from loraplex_gateway.finetuning.order import AUTO, BASE_RATE

ORGANISATION = "loraplex"

_STATUS = {
    JobState.RUNNING: "running",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
"""Jobs in other states are "queued": also one that waits for a server that is away."""

_SENTENCES = {
    JobState.QUEUED: "The job is queued",
    JobState.RUNNING: "The job is running",
    JobState.INTERRUPTED: "The server shut down; the job continues later",
    JobState.SUCCEEDED: "The job has successfully completed",
    JobState.FAILED: "The job failed",
    JobState.CANCELLED: "The job was cancelled",
}


def job_object(job: TrainingJob, base: str) -> dict[str, Any]:
    """The description of a job on the model `base`."""
    labels = JobLabels.read(job.delivery.labels)
    hyperparameters = _hyperparameters(job)
    made = job.result is not None
    return {
        "id": job_id(job.job_id),
        "object": "fine_tuning.job",
        "created_at": _seconds(job.create_time),
        "finished_at": _seconds(job.end_time),
        "model": base,
        "fine_tuned_model": (labels.model or job.name) if made else None,
        "organization_id": ORGANISATION,
        "status": _STATUS.get(job.state, "queued"),
        "training_file": labels.training_file,
        "validation_file": labels.validation_file or None,
        "result_files": [],
        "trained_tokens": job.trained_tokens or None,
        "seed": job.settings.seed or 0,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "error": _error(job),
        "estimated_finish": _estimated_finish(job),
        "integrations": [],
        "metadata": dict(labels.metadata or {}),
        "user_provided_suffix": labels.suffix or None,
        "loraplex": {"adapter": f"{job.name}@{job.result.version}"} if job.result else None,
    }


def event_object(job: str, event: JobEvent) -> dict[str, Any]:
    """The description of an event of a job with the server's id `job`."""
    level, message, data = _told(event)
    return {
        "id": f"ftevent-{job}-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.time.timestamp()),
        "level": level,
        "message": message,
        "type": "metrics" if event.progress or event.evaluation else "message",
        "data": data,
    }


def checkpoint_object(job: TrainingJob, checkpoint: JobCheckpoint) -> dict[str, Any]:
    """The description of a checkpoint."""
    model = JobLabels.read(job.delivery.labels).model
    name = checkpoint_model_id(model, checkpoint.step) if model else checkpoint.adapter_id
    evaluation = checkpoint.evaluation
    metrics = {
        "step": checkpoint.step,
        "train_loss": _finite(checkpoint.loss),
        "valid_loss": _finite(evaluation.loss) if evaluation else None,
        "full_valid_loss": _finite(evaluation.loss) if evaluation else None,
    }
    return {
        "id": f"ftckpt_{job.job_id}-{checkpoint.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": _seconds(checkpoint.time) or 0,
        "fine_tuned_model_checkpoint": name,
        "fine_tuning_job_id": job_id(job.job_id),
        "step_number": checkpoint.step,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
    }


def _hyperparameters(job: TrainingJob) -> dict[str, Any]:
    settings, rate = job.settings, job.learning_rate
    return {
        "n_epochs": AUTO if settings.epochs is None else _plain(settings.epochs),
        "batch_size": AUTO if settings.batch_size is None else settings.batch_size,
        "learning_rate_multiplier": AUTO if rate is None else _plain(round(rate / BASE_RATE, 9)),
    }


def _error(job: TrainingJob) -> dict[str, Any] | None:
    if job.error is None:
        return None
    return {"code": job.error.reason.lower(), "message": job.error.message, "param": None}


def _estimated_finish(job: TrainingJob) -> int | None:
    if job.state is not JobState.RUNNING or job.progress is None or job.progress.remaining is None:
        return None
    return int(time.time() + job.progress.remaining)


def _told(event: JobEvent) -> tuple[str, str, dict[str, Any] | None]:
    """Level, sentence and figures of an event."""
    if event.state is not None:
        return "error" if event.state is JobState.FAILED else "info", _SENTENCES.get(
            event.state, f"The job is {event.state}"
        ), None  # fmt: skip
    if (progress := event.progress) is not None:
        loss = _finite(progress.loss)
        text = f"Step {progress.step}/{progress.steps}: training loss={_shown(loss)}"
        return "info", text, {
            "step": progress.step,
            "total_steps": progress.steps,
            "train_loss": loss,
            "learning_rate": _finite(progress.learning_rate),
        }  # fmt: skip
    if (evaluation := event.evaluation) is not None:
        loss = _finite(evaluation.loss)
        text = f"Step {evaluation.step}: validation loss={_shown(loss)}"
        metric = _finite(evaluation.metric)
        return "info", text, {
            "step": evaluation.step,
            "valid_loss": loss,
            "full_valid_loss": loss,
            **({} if metric is None else {"metric": metric}),
        }  # fmt: skip
    if event.checkpoint is not None:
        step, adapter = event.checkpoint.step, event.checkpoint.adapter_id
        return "info", f"Checkpoint created at step {step}: {adapter}", {"step": step}
    if event.samples is not None:
        found = [
            {"prompt": one.prompt, "answer": one.answer, "expected": one.expected}
            for one in event.samples.samples
        ]
        step = event.samples.step
        return "info", f"Answers after step {step}", {"step": step, "samples": found}
    return "warn", event.message or "", None


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _finite(value: float | None) -> float | None:
    """A number that JSON has; None for others."""
    return value if value is not None and math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _plain(value: float) -> float | int:
    """A whole number without its ".0"."""
    return int(value) if value == int(value) else value
