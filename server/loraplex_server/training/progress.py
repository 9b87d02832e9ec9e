"""What a trainer has told so far: its events, put together."""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec
from loraplex_training.report.events import (
    Evaluated,
    Event,
    JobEnded,
    Published,
    RunEnded,
    RunStarted,
    Saved,
    StepDone,
)

from loraplex_server.training.jobs import Evaluation, Progress

WINDOW: Final = 20
"""Steps over which speed is a mean: the last ones say more than the first."""


class Course:
    """The course of one job's training, from its events.

    Attributes:
        progress: as of the last event; None before the first.
        ended, published: these events, once they have come.
        estimated_bytes, peak_bytes: memory as the trainer said; 0 before.
        tokens: of all steps seen here.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress
        self.ended: JobEnded | None = None
        self.published: Published | None = None
        self.estimated_bytes = 0
        self.peak_bytes = 0
        self.tokens = 0
        self._last: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def feed(self, event: Event) -> None:
        """The next event."""
        now = self.progress or Progress()
        match event:
            case RunStarted():
                steps = event.steps[0] if event.steps else 0
                self.estimated_bytes = event.estimated_bytes
                self.progress = Progress(
                    step=event.step,
                    steps=steps,
                    loss=now.loss,
                    evaluation=now.evaluation,
                    best=now.best,
                    saved_step=now.saved_step,
                )
            case StepDone():
                self.progress = self._step(now, event)
            case Evaluated():
                found = Evaluation(event.step, event.loss, event.perplexity, event.metric)
                best = found if event.best or now.best is None else now.best
                self.progress = _with(now, evaluation=found, best=best)
            case Saved():
                self.progress = _with(now, saved_step=event.step)
            case JobEnded():
                self.ended = event
                self.progress = _with(now, step=event.step, remaining=0.0)
            case Published():
                self.published = event
            case RunEnded():
                self.peak_bytes = event.peak_bytes
            case _:
                pass

    def _step(self, now: Progress, event: StepDone) -> Progress:
        self.tokens += event.tokens
        self._last.append((event.tokens, event.seconds))
        seconds = sum(s for _, s in self._last)
        left = max(0, now.steps - event.step)
        return _with(
            now,
            step=event.step,
            loss=event.loss,
            rate=event.rate,
            norm=event.norm,
            tokens_per_second=sum(t for t, _ in self._last) / seconds if seconds > 0 else 0.0,
            remaining=left * seconds / len(self._last),
        )


def _with(progress: Progress, **fields: object) -> Progress:
    return msgspec.structs.replace(progress, **fields)
