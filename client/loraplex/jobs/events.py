"""What happened to a training job, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from loraplex.replies import read
from loraplex.requests import fill
from loraplex.training import Evaluation, JobCheckpoint, JobProgress, JobState
from loraplex.v1 import training_pb2


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """The model's answer to a prompt of the evaluation data, and the answer in the data."""

    prompt: str
    answer: str
    expected: str


@dataclass(frozen=True, slots=True)
class TrainingSamples:
    """Answers after `step` optimiser steps; 0 means before training."""

    step: int
    samples: tuple[TrainingSample, ...]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job. One field besides `number` and `time` is not None.

    `number` counts from 1 within the job; numbers may be missing.
    """

    number: int
    time: datetime
    state: JobState | None
    progress: JobProgress | None
    evaluation: Evaluation | None
    checkpoint: JobCheckpoint | None
    message: str | None
    samples: TrainingSamples | None


def page(
    job_id: str, size: int, after: int, newest_first: bool
) -> training_pb2.ListJobEventsRequest:
    """Returns the request for the page after the event with the number `after`."""
    return fill(
        training_pb2.ListJobEventsRequest,
        job_id=job_id,
        page_size=size,
        page_token=str(after) if after else "",
        newest_first=newest_first,
    )


def event(message: training_pb2.JobEvent) -> JobEvent:
    return read(JobEvent, message)
