"""What a job's history keeps of the events of its trainer."""

from __future__ import annotations

from loraplex_training.report.events import Evaluated, Event, RunStarted, Sampled, StepDone
from msgspec.structs import replace

from loraplex_server.training.history.events import (
    MAX_TEXT,
    JobEventRecord,
    SampleRecord,
    SamplesRecord,
)
from loraplex_server.training.progress import RunProgress

MAX_SAMPLES = 16


class TrainerNotes:
    """Turns the trainer's events into those of the history. Samples of one step become one."""

    def __init__(self) -> None:
        self._step = 0
        self._samples: list[SampleRecord] = []

    def take(self, event: Event, progress: RunProgress) -> list[JobEventRecord]:
        """Returns what is to be recorded now. `progress` has taken the event into account."""
        if isinstance(event, Sampled):
            ended = self.end() if event.step != self._step else []
            self._step = event.step
            if len(self._samples) < MAX_SAMPLES:
                shown = (
                    event.prompt[-MAX_TEXT:],
                    event.answer[:MAX_TEXT],
                    event.reference[:MAX_TEXT],
                )
                self._samples.append(SampleRecord(*shown))
            return ended
        found = self.end()
        now = progress.state
        match event:
            case RunStarted() if event.step:
                text = f"the training continues after step {event.step}"
                found.append(JobEventRecord(message=text))
            case StepDone() if now is not None:
                found.append(JobEventRecord(progress=replace(now, evaluation=None, best=None)))
            case Evaluated() if now is not None:
                found.append(JobEventRecord(evaluation=now.evaluation))
        return found

    def end(self) -> list[JobEventRecord]:
        """Returns what is left to be recorded when no more events come."""
        if not self._samples:
            return []
        samples = SamplesRecord(self._step, tuple(self._samples))
        self._samples = []
        return [JobEventRecord(samples=samples)]
