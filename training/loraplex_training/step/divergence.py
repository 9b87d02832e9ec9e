"""When a job's loss says that nothing will come of it any more.

A loss explodes that is above `limit`: three times what it was before the first step and two nats
more than that, whichever is higher (from a loss of 0.1, three times as much is still good). It has
diverged when `STEPS` training steps in a row are there and the last is not below the first, or when
two evaluations in a row are and the second is not below the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STEPS = 5
EVALUATIONS = 2


@dataclass
class Watch:
    """What was seen of a job's losses.

    Attributes:
        reference: the loss before the first step, or the first step's where nothing is evaluated.
        steps, evaluations: the latest losses above the limit, without one below it between them.
    """

    reference: float | None = None
    steps: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """Above it a loss explodes."""
        if self.reference is None:
            return math.inf
        return max(3 * self.reference, self.reference + 2)

    def trained(self, loss: float) -> str:
        """Looks at a step's loss; a sentence if the job has diverged, else ""."""
        if self.reference is None:
            self.reference = loss
        self.steps = [*self.steps, loss][-STEPS:] if loss > self.limit else []
        return self._verdict(self.steps, STEPS, "steps")

    def evaluated(self, loss: float) -> str:
        """Looks at an evaluation's loss; the first one is the reference."""
        if self.reference is None:
            self.reference = loss
        self.evaluations = [*self.evaluations, loss][-EVALUATIONS:] if loss > self.limit else []
        return self._verdict(self.evaluations, EVALUATIONS, "evaluations")

    def _verdict(self, losses: list[float], most: int, what: str) -> str:
        if len(losses) < most or losses[-1] < losses[0]:
            return ""
        return (
            f"the loss was {self.reference:.3g} at first and above {self.limit:.3g} for {most} "
            f"{what} in a row, at last {losses[-1]:.3g}; lower lr"
        )
