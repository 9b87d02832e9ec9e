"""What a run tells while it goes on: to the terminal, to curves, to whoever asked for the run.

Values only. `Observer`s get them in the order in which things happen, on the run's thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol


class JobState(Enum):
    """Where a job is. All but the first are final."""

    TRAINING = "training"
    FINISHED = "finished"
    STOPPED_EARLY = "stopped_early"
    DIVERGED = "diverged"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Before the first step, and again when a run is resumed at `step`.

    Attributes:
        estimated_bytes: the most memory that the process is expected to take.
        optimisers: for each job what its optimiser's state really is ("AdamW, float32, 1.2 MB").
    """

    jobs: tuple[str, ...]
    steps: tuple[int, ...]
    step: int
    device: str
    estimated_bytes: int
    optimisers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepDone:
    """A job's optimiser step, counted from 1.

    Attributes:
        loss: mean over the step's learned tokens, nats, without penalties.
        norm: of the gradient, before clipping.
        tokens, learned: of the step. seconds: of the pass that it shared.
    """

    job: str
    step: int
    loss: float
    rate: float
    norm: float
    tokens: int
    learned: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A job's loss on examples set apart; `metric` is the share of right answers, if asked for."""

    job: str
    step: int
    loss: float
    perplexity: float
    metric: float | None
    best: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answer before (step 0) or after training."""

    job: str
    step: int
    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job has left the batch; `reason` says why in a sentence."""

    job: str
    state: JobState
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint of the whole run is safe on disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Published:
    """An adapter is in its folder; with a store, registered there; with a server, loaded."""

    job: str
    path: Path
    digest: str
    version: str
    server: str = ""
    sample: str = ""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """After the last event of the jobs."""

    seconds: float
    tokens: int
    peak_bytes: int


Event = (
    RunStarted | StepDone | Evaluated | Sampled | JobEnded | Saved | Published | RunEnded
)  # fmt: skip


class Observer(Protocol):
    """Is told what happens. Must not raise; a slow one slows the run."""

    def on(self, event: Event) -> None: ...
