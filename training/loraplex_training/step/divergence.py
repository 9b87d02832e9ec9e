"""Detects that a job has diverged.

A loss counts as exploded above `limit`: the larger of 3 × initial and initial + 2 nats. (From an
initial 0.1, three times as much would still be good.) A job has diverged when the losses of
`STEPS` consecutive training steps, or of `EVALUATIONS` consecutive evaluations, have exploded and
the last of them is not below the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STEPS = 5
EVALUATIONS = 2


@dataclass
class DivergenceWatch:
    """The losses of a job that decide whether it has diverged.

    Attributes:
        reference: the initial loss: before the first step, or of it if nothing is evaluated.
        steps: the latest consecutive training losses above the limit.
        evaluations: the latest consecutive evaluation losses above the limit.
    """

    reference: float | None = None
    steps: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """Largest loss that has not exploded; infinite before the first loss."""
        if self.reference is None:
            return math.inf
        return max(3 * self.reference, self.reference + 2)

    def trained(self, loss: float) -> str:
        """Takes a step's loss into account; returns a sentence if the job has diverged, or ""."""
        if self.reference is None:
            self.reference = loss
        self.steps = [*self.steps, loss][-STEPS:] if loss > self.limit else []
        return self._sentence(self.steps, STEPS, "steps")

    def evaluated(self, loss: float) -> str:
        """Takes an evaluation's loss into account and returns as `trained` does."""
        if self.reference is None:
            self.reference = loss
        self.evaluations = [*self.evaluations, loss][-EVALUATIONS:] if loss > self.limit else []
        return self._sentence(self.evaluations, EVALUATIONS, "evaluations")

    def _sentence(self, losses: list[float], most: int, what: str) -> str:
        if len(losses) < most or losses[-1] < losses[0]:
            return ""
        return (
            f"the loss was {self.reference:.3g} at first and above {self.limit:.3g} for {most} "
            f"{what} in a row, finally {losses[-1]:.3g}; lower lr"
        )
