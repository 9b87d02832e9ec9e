"""Training jobs as plain values, and how requests and replies carry them; for both clients."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from loraplex.errors import invalid
from loraplex.requests import fill
from loraplex.v1 import training_pb2

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp


class JobState(StrEnum):
    """Where a job is."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # goes on when its server is there again
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended for good."""
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measurement after `step` on examples that were set apart; `loss` is in nats a token.

    `metric` is the share of right answers, None unless a metric was asked for.
    """

    step: int
    loss: float
    perplexity: float
    metric: float | None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is. `remaining` is in seconds; what was not measured yet is None."""

    step: int
    steps: int
    loss: float | None
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    remaining: float | None
    evaluation: Evaluation | None
    best_evaluation: Evaluation | None
    saved_step: int


@dataclass(frozen=True, slots=True)
class JobResult:
    """The version that was registered, and how the training ended.

    `warning` says what went wrong after that: its load, its alias.
    """

    version: int
    digest: str
    ending: str
    loaded: bool
    warning: str
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class JobError:
    """Why there is no adapter. `reason` is a stable word, `log` the trainer's last lines."""

    reason: str
    message: str
    log: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One adapter in the making, or how that ended; times are in UTC.

    `options` are the method's; `queue_position` is the number of jobs before one that waits.
    """

    job_id: str
    state: JobState
    name: str
    method: str
    options: Mapping[str, str]
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    queue_position: int
    resumptions: int
    estimated_bytes: int
    progress: JobProgress | None
    result: JobResult | None
    error: JobError | None


class TrainingOptions(TypedDict, total=False):
    """Keywords of `create`. None, like leaving out, is the trainer's default."""

    # What is trained.
    method: str | None  # "lora", "dora", "prefix_tuning", ...; default "lora"
    options: Mapping[str, object] | None  # the method's own: {"r": 16, "target_modules": "qkv"}

    # How long, and on how much at a time.
    epochs: float | None  # passes over the data; or
    steps: int | None  # optimiser steps
    batch_size: int | None  # examples of a micro-batch
    accumulation: int | None  # micro-batches of an optimiser step
    pack: bool | None  # short examples share a row
    max_tokens: int | None  # of a packed micro-batch
    max_length: int | None  # tokens of an example; what is beyond is cut
    seed: int | None

    # The optimiser.
    optimiser: str | None  # "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"
    learning_rate: float | None
    weight_decay: float | None
    schedule: str | None  # "constant", "linear", "cosine", ...
    warmup: float | None  # share of the steps in which the rate rises
    clip: float | None  # largest norm of a gradient; 0 is none

    # What is learnt, and how it is measured.
    learn: str | None  # "auto", "completion", "assistant" or "all"
    system: str | None  # a system message for examples that have none
    eval_fraction: float | None  # of the data, set apart
    eval_every: int | None  # steps between evaluations; 0: once an epoch
    patience: int | None  # evaluations without a better one before it stops; 0: never
    metric: str | None  # "exact", "json" or "regex:<expression>"

    # What happens with the adapter.
    replace: bool | None  # let a taken name move to it
    load: bool | None  # onto the device at once
    alias: str | None  # to point to it
    labels: Mapping[str, str] | None


_OPTIMISER = ("learning_rate", "weight_decay", "schedule", "warmup", "clip")
_DELIVERY = ("replace", "load", "alias", "labels")
_OWN = ("method", "options", "optimiser")


def create(
    name: str,
    data: bytes | str | os.PathLike[str] | None,
    server_path: str,
    eval_data: bytes | str | os.PathLike[str] | None,
    eval_server_path: str,
    request_id: str,
    given: TrainingOptions,
) -> training_pb2.CreateJobRequest:
    """The request for a job. Raises InvalidRequest, and TypeError for an unknown keyword."""
    unknown = given.keys() - TrainingOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    values: Mapping[str, Any] = given
    options = {key: option(value) for key, value in (values.get("options") or {}).items()}
    spec = {
        key: value for key, value in values.items() if key not in (*_OPTIMISER, *_DELIVERY, *_OWN)
    }
    optimiser = {key: values.get(key) for key in _OPTIMISER}
    return training_pb2.CreateJobRequest(
        # Asked twice, because a reply was lost, it is one job.
        request_id=request_id or uuid.uuid4().hex,
        spec=fill(
            training_pb2.TrainingSpec,
            "",
            name=name,
            method=fill(
                training_pb2.TrainingMethod, "", name=values.get("method"), options=options
            ),
            optimiser=fill(
                training_pb2.TrainingOptimiser, "", name=values.get("optimiser"), **optimiser
            ),
            **spec,
        ),
        data=_data("data", data, server_path, needed=True),
        eval_data=_data("eval_data", eval_data, eval_server_path, needed=False),
        delivery=fill(
            training_pb2.TrainingDelivery, "", **{key: values.get(key) for key in _DELIVERY}
        ),
    )


def option(value: object) -> str:
    """A method's option as text: true, 16, "q_proj,v_proj"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{key}={option(one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(option(one) for one in value)
    return str(value)


def page(size: int, token: str, states: Sequence[JobState | str]) -> training_pb2.ListJobsRequest:
    """The request for a page of jobs."""
    try:
        numbers = [
            training_pb2.TrainingJobState.Value(f"TRAINING_JOB_STATE_{JobState(state).name}")
            for state in states
        ]
    except ValueError as error:
        raise invalid("states", str(error)) from None
    return fill(training_pb2.ListJobsRequest, "", page_size=size, page_token=token, states=numbers)


def job(reply: training_pb2.TrainingJob) -> TrainingJob:
    """What a reply says of a job."""
    return TrainingJob(
        job_id=reply.job_id,
        state=_state(reply.state),
        name=reply.spec.name,
        method=reply.spec.method.name,
        options=dict(reply.spec.method.options),
        create_time=_time(reply.create_time) if reply.HasField("create_time") else None,
        start_time=_time(reply.start_time) if reply.HasField("start_time") else None,
        end_time=_time(reply.end_time) if reply.HasField("end_time") else None,
        queue_position=reply.queue_position,
        resumptions=reply.resumptions,
        estimated_bytes=reply.estimated_bytes,
        progress=_progress(reply.progress) if reply.HasField("progress") else None,
        result=_result(reply.result) if reply.HasField("result") else None,
        error=_error(reply.error) if reply.HasField("error") else None,
    )


def _data(
    field: str, local: bytes | str | os.PathLike[str] | None, server_path: str, needed: bool
) -> training_pb2.TrainingData | None:
    if local is not None and server_path:
        raise invalid(field, "give either the data or its path on the server")
    if server_path:
        return fill(training_pb2.TrainingData, f"{field}.", path=server_path)
    if local is None:
        if needed:
            raise invalid(field, "give the data, or its path on the server")
        return None
    if isinstance(local, bytes):
        return training_pb2.TrainingData(jsonl=local)
    try:
        return training_pb2.TrainingData(jsonl=Path(local).read_bytes())
    except OSError as error:
        raise invalid(field, f"{local} cannot be read: {error.strerror}") from None


def _state(number: int) -> JobState:
    """The states' names are the wire's; one that a newer server may send is not an error."""
    known = training_pb2.TrainingJobState.DESCRIPTOR.values_by_number.get(number)
    if known is None:
        return JobState.UNSPECIFIED
    return JobState(known.name.removeprefix("TRAINING_JOB_STATE_").lower())


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def _progress(now: training_pb2.TrainingProgress) -> JobProgress:
    return JobProgress(
        step=now.step,
        steps=now.steps,
        loss=now.loss if now.HasField("loss") else None,
        learning_rate=now.learning_rate,
        gradient_norm=now.gradient_norm,
        tokens_per_second=now.tokens_per_second,
        remaining=(
            now.remaining.ToTimedelta().total_seconds() if now.HasField("remaining") else None
        ),
        evaluation=_evaluation(now.evaluation) if now.HasField("evaluation") else None,
        best_evaluation=(
            _evaluation(now.best_evaluation) if now.HasField("best_evaluation") else None
        ),
        saved_step=now.saved_step,
    )


def _evaluation(found: training_pb2.TrainingEvaluation) -> Evaluation:
    metric = found.metric if found.HasField("metric") else None
    return Evaluation(found.step, found.loss, found.perplexity, metric)


def _result(found: training_pb2.TrainingResult) -> JobResult:
    return JobResult(
        found.version, found.digest, found.ending, found.loaded, found.warning, found.peak_bytes
    )


def _error(found: training_pb2.TrainingError) -> JobError:
    return JobError(found.reason, found.message, tuple(found.log))
