"""A training job as a value, kept as JSON: what was ordered, its progress, its end.

Values never change; a change of a job makes a new `JobRecord`.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, TypeAlias

import msgspec
from loraplex_model.base.refusal import Reason

Scalar: TypeAlias = bool | int | float | str


JOB: Final = "loraplex.v1.TrainingJob"
ADAPTER: Final = "loraplex.v1.Adapter"
"""Resource types that refusals of training name."""


class State(Enum):
    """State of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL: Final = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class JobOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter that a client ordered.

    Attributes:
        name: name to register the adapter under.
        method: name of a training method.
        options: options of the method, as text.
        settings: other options of the job that the client gave, by the trainer's keys.
        replace: whether to make a new version if the name is taken.
        load: whether to load the adapter once it is registered.
        alias: alias to point to the adapter, or "".
        labels: labels of the registered version.
        checkpoints: whether to register the adapter at every evaluation, too.
    """

    name: str
    method: str = "lora"
    options: dict[str, str] = {}
    settings: dict[str, Scalar] = {}
    replace: bool = False
    load: bool = False
    alias: str = ""
    labels: dict[str, str] = {}
    checkpoints: bool = False


class EvaluationRecord(msgspec.Struct, frozen=True):
    """An evaluation after `step` on the evaluation examples; `loss` is in nats.

    JSON turns a number that is not finite into null, so it reads back as None.
    """

    step: int
    loss: float | None
    perplexity: float | None
    metric: float | None = None


class ProgressRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a job; see TrainingProgress of the API. `remaining` is in seconds.

    None means not yet known, or a number that was not finite and went through JSON.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    rate: float = 0.0
    norm: float | None = 0.0
    tokens_per_second: float = 0.0
    remaining: float | None = None
    evaluation: EvaluationRecord | None = None
    best: EvaluationRecord | None = None
    saved_step: int = 0


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was registered while its job ran on.

    Attributes:
        step: number of optimiser steps before it.
        name, version, digest: the registered adapter.
        time: Unix time.
        loss: mean loss of the step in nats.
    """

    step: int
    name: str
    version: int
    digest: str
    time: float
    evaluation: EvaluationRecord | None = None
    loss: float | None = None


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The registered adapter; `warning` lists what failed after the registration."""

    version: int
    digest: str
    loaded: bool = False
    warning: str = ""


class FailureRecord(msgspec.Struct, frozen=True):
    """Why there is no adapter; `log` holds the last lines of the trainer's log."""

    reason: Reason
    message: str
    log: tuple[str, ...] = ()


class JobOwner(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who ordered a job, as the principal was then: its adapter is registered later.

    Attributes:
        name: name of the principal; "" if callers were not identified.
        seen: text of the selector of the adapters that exist for it.
        copies: as in `RegistrationTerms`.
    """

    name: str = ""
    seen: str = ""
    copies: str = ""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A training job.

    Attributes:
        id: identifier; ids sort by age.
        owner: who ordered it.
        request_id: the client's own id of its request, or "". Each owner has ids of its own.
        content: digest of the whole request.
        created, started, ended: Unix times; 0 if that has not happened yet.
        made: directory of the finished adapter, relative to the job's; "" while there is none.
        resumptions: number of restarts after the server died while the job ran.
        estimated_bytes, peak_bytes: memory of the trainer; 0 if unknown.
        ending: a sentence on how the training ended.
        checkpoints: adapters that were registered during the job and are kept, the oldest first.
        trained_tokens: number of tokens trained on.
    """

    id: str
    order: JobOrder
    owner: JobOwner = JobOwner()
    request_id: str = ""
    content: str = ""
    state: State = State.QUEUED
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    progress: ProgressRecord | None = None
    made: str = ""
    ending: str = ""
    result: ResultRecord | None = None
    error: FailureRecord | None = None
    resumptions: int = 0
    estimated_bytes: int = 0
    peak_bytes: int = 0
    checkpoints: tuple[CheckpointRecord, ...] = ()
    trained_tokens: int = 0

    @property
    def final(self) -> bool:
        """Whether the job has ended for good."""
        return self.state in FINAL

    def is_of(self, owner: str | None) -> bool:
        """Whether the job exists for the principal `owner`; None stands for those who see all."""
        return owner in (None, self.owner.name)

    def change(self, **fields: object) -> JobRecord:
        """Returns the job with other values in some fields."""
        return msgspec.structs.replace(self, **fields)
