"""Events of a training run: what observers such as the terminal, the curves and a server receive.

Events are values. Observers receive them in the order in which things happen, on the run's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from loraplex_model.base.refusal import Problem, Reason
from msgspec import Struct

log = logging.getLogger(__name__)


class JobStatus(Enum):
    """Whether a job trains, or how it ended. All but the first are final."""

    TRAINING = "training"
    FINISHED = "finished"
    STOPPED_EARLY = "stopped_early"
    DIVERGED = "diverged"
    CANCELLED = "cancelled"


class _Event(Struct, frozen=True, tag_field="event", tag=True):
    """An event. In JSON its class's name stands under "event", so it cannot be renamed."""


class RunStarted(_Event, frozen=True):
    """The run is about to take its first step, or its next one after `step` if it was resumed.

    Attributes:
        steps: optimiser steps of each job.
        estimated_bytes: estimated peak memory of the process.
        optimisers: for each job, the state that its optimiser keeps ("AdamW, float32, 1.2 MB").
        precision: the types of the pass ("products in bfloat16, dense tensors in bfloat16"); empty
            in records of earlier versions.
        tokens: for each job, the tokens trained on before; empty in records of earlier versions.
    """

    jobs: tuple[str, ...]
    steps: tuple[int, ...]
    step: int
    device: str
    estimated_bytes: int
    optimisers: tuple[str, ...]
    precision: str = ""
    tokens: tuple[int, ...] = ()


class StepDone(_Event, frozen=True):
    """A job has taken an optimiser step; `step` counts from 1.

    Attributes:
        loss: mean over the step's learned tokens in nats, without penalties.
        rate: learning rate of the step.
        norm: norm of the gradient before clipping.
        tokens: number of tokens in the step.
        learned: number of these that are learned.
        seconds: duration of the passes, which other jobs may have shared.
    """

    job: str
    step: int
    loss: float
    rate: float
    norm: float
    tokens: int
    learned: int
    seconds: float


class Evaluated(_Event, frozen=True):
    """A job's loss (nats) on its evaluation examples after `step`.

    Attributes:
        metric: share of correct answers; None unless the job asks for a metric.
        best: true if this is the job's lowest loss so far, so that these parameters are kept.
    """

    job: str
    step: int
    loss: float
    perplexity: float
    metric: float | None
    best: bool


class Sampled(_Event, frozen=True):
    """An answer generated before (step 0) or after training; `reference` is the expected one."""

    job: str
    step: int
    prompt: str
    answer: str
    reference: str

    @property
    def when(self) -> str:
        """The step in words."""
        return f"after {self.step} steps" if self.step else "before training"


class Exported(_Event, frozen=True):
    """A job's adapter as it was evaluated after `step` is in a directory of its own.

    The directory is removed once enough newer ones are there.
    """

    job: str
    step: int
    path: Path


class JobEnded(_Event, frozen=True):
    """A job has ended; `reason` is a sentence on why."""

    job: str
    state: JobStatus
    step: int
    reason: str


class Saved(_Event, frozen=True):
    """A checkpoint of the whole run is on the disk."""

    step: int
    path: Path


class Published(_Event, frozen=True):
    """An adapter is in its directory and, where asked for, in a store and on a server.

    Attributes:
        version: "name@3" in the store or on the server, or "".
        server: address of the server that loaded the adapter, or "".
        sample: that server's answer to an example, or "".
    """

    job: str
    path: Path
    digest: str
    version: str
    server: str = ""
    sample: str = ""


class RunEnded(_Event, frozen=True):
    """Training is over, for this process: all jobs have ended, or the run was stopped and saved."""

    seconds: float
    tokens: int
    peak_bytes: int


class Failed(_Event, frozen=True):
    """The command ends with a refusal; no event follows.

    Attributes:
        problems: everything that is wrong. A field is the path of an option, as in
            `jobs.tickets.lr` or `run.threads`, `data` or `eval_data` for lines of a file, or "".
    """

    reason: Reason
    problems: tuple[Problem, ...]


Event = (
    RunStarted
    | StepDone
    | Evaluated
    | Sampled
    | Exported
    | JobEnded
    | Saved
    | Published
    | RunEnded
    | Failed
)


class Observer(Protocol):
    """Receives every event. It must not raise; a slow observer slows the run."""

    def on(self, event: Event) -> None: ...


_On = Callable[[Any, Any], None]


def until_failure(what: str, *errors: type[Exception]) -> Callable[[_On], _On]:
    """Returns a decorator of `Observer.on` that ends the observer after one of `errors`.

    The error is logged as a warning that begins with `what`; the run goes on.
    """

    def decorate(on: _On) -> _On:
        failed: WeakSet[Any] = WeakSet()

        @wraps(on)
        def guarded(self: Any, event: Any) -> None:
            if self not in failed:
                try:
                    on(self, event)
                except errors as error:
                    failed.add(self)
                    log.warning("%s: %s", what, error)

        return guarded

    return decorate
