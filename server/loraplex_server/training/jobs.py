"""A training job as a value: what was asked, how far it is, how it ended. Written as JSON.

A change makes a new `Job`; whoever holds one holds a state that was true at one moment.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, TypeAlias

import msgspec

Scalar: TypeAlias = bool | int | float | str


JOB: Final = "loraplex.v1.TrainingJob"
ADAPTER: Final = "loraplex.v1.Adapter"
"""Kinds of the resources that refusals of training name."""


class State(Enum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL: Final = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.

    Attributes:
        name: what the adapter is registered as.
        method, options: a method of the trainer and its own options, as text.
        settings: other keys of a job in the trainer's configuration, those that were given.
        replace, load, alias, labels: what happens with the adapter.
    """

    name: str
    method: str = "lora"
    options: dict[str, str] = {}
    settings: dict[str, Scalar] = {}
    replace: bool = False
    load: bool = False
    alias: str = ""
    labels: dict[str, str] = {}


class Evaluation(msgspec.Struct, frozen=True):
    """A measurement after `step` on examples that were set apart; `loss` in nats.

    None is what JSON makes of a number that is not finite.
    """

    step: int
    loss: float | None
    perplexity: float | None
    metric: float | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is; see TrainingProgress of the API. `remaining` is in seconds.

    None is "not yet", or what JSON makes of a number that is not finite.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    rate: float = 0.0
    norm: float | None = 0.0
    tokens_per_second: float = 0.0
    remaining: float | None = None
    evaluation: Evaluation | None = None
    best: Evaluation | None = None
    saved_step: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was registered, and what went wrong after that."""

    version: int
    digest: str
    loaded: bool = False
    warning: str = ""


class Error(msgspec.Struct, frozen=True):
    """Why there is no adapter; `log` holds the last lines that the trainer wrote."""

    reason: str
    message: str
    log: tuple[str, ...] = ()


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job.

    Attributes:
        id: sorts by age.
        request_id, content: what it was asked with, and the digest of all that was asked.
        created, started, ended: Unix times; 0 before.
        made: the adapter's folder, relative to the job's, once the trainer has ended well.
        resumptions: how often it was begun again after the server had died under it.
        estimated_bytes, peak_bytes: memory of the trainer; 0 if unknown.
        ending: how the training ended, in a sentence.
    """

    id: str
    order: Order
    request_id: str = ""
    content: str = ""
    state: State = State.QUEUED
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    progress: Progress | None = None
    made: str = ""
    ending: str = ""
    result: Result | None = None
    error: Error | None = None
    resumptions: int = 0
    estimated_bytes: int = 0
    peak_bytes: int = 0

    @property
    def final(self) -> bool:
        """Whether it has ended for good."""
        return self.state in FINAL

    def change(self, **fields: object) -> Job:
        """The same job with other fields."""
        return msgspec.structs.replace(self, **fields)
