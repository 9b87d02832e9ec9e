"""The progress of a training run, gathered from the trainer's events."""

from __future__ import annotations

from collections import deque
from typing import Final

from loraplex_training.report.events import (
    Evaluated,
    Event,
    Failed,
    JobEnded,
    Published,
    RunEnded,
    RunStarted,
    Saved,
    StepDone,
)
from msgspec.structs import replace

from loraplex_server.training.jobs import EvaluationRecord, ProgressRecord

WINDOW: Final = 20
"""Number of recent steps that the speed is averaged over."""


class RunProgress:
    """Gathers the events of a run of one job.

    Attributes:
        state: the job's progress as of the last event; None before the first.
        ended, published, failed: these events once they have arrived.
        estimated_bytes, peak_bytes: the trainer's memory; 0 if not yet known.
        tokens: number of tokens of all steps seen here.
        trained_tokens: number of tokens of all steps of the job.
    """

    def __init__(self, state: ProgressRecord | None = None, trained_tokens: int = 0) -> None:
        """`state` and `trained_tokens` are those of an earlier process of the same job."""
        self.state = state
        self.trained_tokens = trained_tokens
        self.ended: JobEnded | None = None
        self.published: Published | None = None
        self.failed: Failed | None = None
        self.estimated_bytes = 0
        self.peak_bytes = 0
        self.tokens = 0
        self._last: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def feed(self, event: Event) -> None:
        """Takes the next event into account."""
        now = self.state or ProgressRecord()
        match event:
            case RunStarted():
                self.estimated_bytes = event.estimated_bytes
                if event.tokens or not event.step:
                    self.trained_tokens = sum(event.tokens)
                self.state = ProgressRecord(
                    step=event.step,
                    steps=event.steps[0] if event.steps else 0,
                    loss=now.loss,
                    evaluation=now.evaluation,
                    best=now.best,
                    saved_step=now.saved_step,
                )
            case StepDone():
                self.state = self._step(now, event)
            case Evaluated():
                found = EvaluationRecord(event.step, event.loss, event.perplexity, event.metric)
                best = found if event.best or now.best is None else now.best
                self.state = replace(now, evaluation=found, best=best)
            case Saved():
                self.state = replace(now, saved_step=event.step)
            case JobEnded():
                self.ended = event
                self.state = replace(now, step=event.step, remaining=0.0)
            case Published():
                self.published = event
            case RunEnded():
                self.peak_bytes = event.peak_bytes
            case Failed():
                self.failed = event

    def _step(self, now: ProgressRecord, event: StepDone) -> ProgressRecord:
        self.tokens += event.tokens
        self.trained_tokens += event.tokens
        self._last.append((event.tokens, event.seconds))
        seconds = sum(s for _, s in self._last)
        left = max(0, now.steps - event.step)
        return replace(
            now,
            step=event.step,
            loss=event.loss,
            rate=event.rate,
            norm=event.norm,
            tokens_per_second=sum(t for t, _ in self._last) / seconds if seconds > 0 else 0.0,
            remaining=left * seconds / len(self._last),
        )
