"""Training jobs as plain values, and their requests and replies."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict

from loraplex.errors import invalid
from loraplex.replies import read
from loraplex.requests import fill, part, refuse_unknown
from loraplex.v1 import training_pb2


class JobState(StrEnum):
    """The state of a job."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # its server shut down; it continues when the server is back
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended for good."""
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measurement on the evaluation data after `step` optimiser steps.

    `loss` is the mean per token in nats. `metric` is the share of right answers, or None without a
    metric.
    """

    step: int
    loss: float
    perplexity: float
    metric: float | None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """The progress of a job. Values that have not been measured yet are None.

    `loss` is in nats per token, `remaining` in seconds. `saved_step` is the step of the last
    checkpoint, 0 if there is none.
    """

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
    """The adapter that a job registered.

    `ending` says how the training ended, `warning` what failed after the registration (loading the
    adapter or moving its alias; "" if nothing did). `peak_bytes` is the trainer's peak memory.
    """

    version: int
    digest: str
    ending: str
    loaded: bool
    warning: str
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class JobError:
    """The reason why a job failed: a stable word, a sentence, and the trainer's last log lines."""

    reason: str
    message: str
    log: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobCheckpoint:
    """An adapter that was registered after `step`, while its job ran on.

    `adapter_id` is its name and version, as in "name@1". `loss` is that of the step in nats.
    """

    step: int
    adapter_id: str
    digest: str
    time: datetime | None
    evaluation: Evaluation | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What a job was asked for beside its method. None means the trainer's default."""

    epochs: float | None
    steps: int | None
    batch_size: int | None
    accumulation: int | None
    max_length: int | None
    eval_fraction: float | None
    eval_every: int | None
    patience: int | None
    seed: int | None


@dataclass(frozen=True, slots=True)
class JobDelivery:
    """What happens to the finished adapter: see `TrainingOptions`."""

    replace: bool
    load: bool
    alias: str
    labels: Mapping[str, str]
    checkpoints: bool


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training job. Times are in UTC.

    `options` are the options of the training method. `queue_position` is the number of jobs ahead
    of a queued job. `resumptions` counts restarts after a crash of the server. `estimated_bytes` is
    the expected peak memory, 0 if unknown. `checkpoints` are the adapters that were registered
    during the job, the oldest first. `learning_rate` is the one that was asked for; None means the
    trainer's default.
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
    checkpoints: tuple[JobCheckpoint, ...]
    trained_tokens: int
    settings: JobSettings
    learning_rate: float | None
    delivery: JobDelivery


class TrainingOptions(TypedDict, total=False):
    """Keywords of `create`. None means the trainer's default, like leaving it out."""

    # The method.
    method: str | None  # "lora", "dora", "prefix_tuning", ...; default "lora"
    options: Mapping[str, object] | None  # the method's own: {"r": 16, "target_modules": "qkv"}

    # Length and batches.
    epochs: float | None  # passes over the data; not with `steps`
    steps: int | None  # optimiser steps
    batch_size: int | None  # examples per micro-batch
    accumulation: int | None  # micro-batches per optimiser step
    pack: bool | None  # put several short examples into one row
    max_tokens: int | None  # tokens per packed micro-batch
    max_length: int | None  # tokens per example; longer examples are cut
    seed: int | None  # random seed for example order, initial values and dropout

    # The optimiser.
    optimiser: str | None  # "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit" or "sgd"
    learning_rate: float | None
    weight_decay: float | None
    schedule: str | None  # of the learning rate: "constant", "linear", "cosine", ...
    warmup: float | None  # share of the steps in which the learning rate rises
    clip: float | None  # largest gradient norm; 0 means no clipping

    # The loss and the evaluation.
    learn: str | None  # tokens to learn: "auto", "completion", "assistant" or "all"
    system: str | None  # system message for examples that have none
    eval_fraction: float | None  # share of the data set apart for evaluation
    eval_every: int | None  # steps between evaluations; 0 means once an epoch
    patience: int | None  # evaluations without improvement before stopping; 0 means never stop
    metric: str | None  # "exact", "json" or "regex:<expression>"

    # The finished adapter.
    replace: bool | None  # move a name that is taken to the new adapter
    load: bool | None  # load it onto the device
    alias: str | None  # point this alias to it
    labels: Mapping[str, str] | None
    checkpoints: bool | None  # register it at every evaluation, too, as NAME-step-N: the latest 8


def create(
    name: str,
    data: bytes | str | os.PathLike[str] | None,
    server_path: str,
    eval_data: bytes | str | os.PathLike[str] | None,
    eval_server_path: str,
    request_id: str,
    given: TrainingOptions,
    data_id: str = "",
    eval_data_id: str = "",
) -> training_pb2.CreateJobRequest:
    """Returns the request for a job. Raises InvalidRequest; TypeError for an unknown keyword."""
    refuse_unknown(given, TrainingOptions)
    values: Mapping[str, Any] = given
    given_options = values.get("options") or {}
    if not isinstance(given_options, Mapping):
        raise invalid("options", "must be options by their names")
    options = {key: option(value) for key, value in given_options.items()}
    method = {"name": values.get("method"), "options": options}
    optimiser = {**values, "name": values.get("optimiser")}
    spec = {
        **values,
        "name": name,
        "method": part(training_pb2.TrainingMethod, "", method),
        "optimiser": part(training_pb2.TrainingOptimiser, "", optimiser),
    }
    return training_pb2.CreateJobRequest(
        # A retry after a lost reply must not create a second job.
        request_id=request_id or uuid.uuid4().hex,
        spec=part(training_pb2.TrainingSpec, "", spec),
        data=_data("data", data, server_path, data_id, needed=True),
        eval_data=_data("eval_data", eval_data, eval_server_path, eval_data_id, needed=False),
        delivery=part(training_pb2.TrainingDelivery, "", values),
    )


def option(value: object) -> str:
    """Returns a method's option as text, such as "true", "16" or "q_proj,v_proj"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{key}={option(one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(option(one) for one in value)
    return str(value)


def page(size: int, states: Sequence[JobState | str]) -> training_pb2.ListJobsRequest:
    """Returns the request for the first page. Raises InvalidRequest for an unknown state."""
    try:
        numbers = [
            training_pb2.TrainingJobState.Value(f"TRAINING_JOB_STATE_{JobState(state).name}")
            for state in states
        ]
    except ValueError as error:
        raise invalid("states", str(error)) from None
    return fill(training_pb2.ListJobsRequest, page_size=size, states=numbers)


def job(reply: training_pb2.TrainingJob) -> TrainingJob:
    spec = reply.spec
    optimiser = spec.optimiser
    rate = optimiser.learning_rate if optimiser.HasField("learning_rate") else None
    return read(
        TrainingJob,
        reply,
        name=spec.name,
        method=spec.method.name,
        options=dict(spec.method.options),
        settings=read(JobSettings, spec),
        learning_rate=rate,
    )


class JobLog:
    """Reads the states of a job that a watch sends."""

    def receive(self, message: training_pb2.WatchJobResponse) -> TrainingJob:
        return job(message.job)

    def end(self, cancelled: bool) -> None:
        """A watch may end at any time."""


def _data(
    field: str,
    local: bytes | str | os.PathLike[str] | None,
    server_path: str,
    data_id: str,
    needed: bool,
) -> training_pb2.TrainingData | None:
    if (local is not None) + bool(server_path) + bool(data_id) > 1:
        text = "give either the data, its path on the server or the id of an uploaded file"
        raise invalid(field, text)
    if data_id:
        return fill(training_pb2.TrainingData, f"{field}.", data_id=data_id)
    if server_path:
        return fill(training_pb2.TrainingData, f"{field}.", path=server_path)
    if local is None:
        if needed:
            text = "give the data, its path on the server or the id of an uploaded file"
            raise invalid(field, text)
        return None
    if isinstance(local, bytes):
        return training_pb2.TrainingData(jsonl=local)
    try:
        return training_pb2.TrainingData(jsonl=Path(local).read_bytes())
    except OSError as error:
        raise invalid(field, f"{local} cannot be read: {error.strerror}") from None
