"""An event of a training job as a value, kept as a line of JSON."""

from __future__ import annotations

import msgspec

from loraplex_server.training.jobs import (
    CheckpointRecord,
    EvaluationRecord,
    ProgressRecord,
    State,
)

MAX_TEXT = 2000
"""Most characters of a prompt, an answer or a message."""


class SampleRecord(msgspec.Struct, frozen=True):
    """A prompt of the evaluation data, the model's answer to it, and the answer in the data."""

    prompt: str
    answer: str
    expected: str


class SamplesRecord(msgspec.Struct, frozen=True):
    """Answers after `step`; 0 means before training."""

    step: int
    samples: tuple[SampleRecord, ...]


class JobEventRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event. Exactly one field besides `number` and `time` (Unix time) is set."""

    number: int = 0
    time: float = 0.0
    state: State | None = None
    progress: ProgressRecord | None = None
    evaluation: EvaluationRecord | None = None
    checkpoint: CheckpointRecord | None = None
    message: str = ""
    samples: SamplesRecord | None = None

    @property
    def step(self) -> int | None:
        """The step after which the trainer has reported the event; None if it has not."""
        for part in (self.progress, self.evaluation, self.samples):
            if part is not None:
                return part.step
        return None
