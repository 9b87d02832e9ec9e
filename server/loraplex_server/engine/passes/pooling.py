"""Final states of tokens that become the vector of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraplex_server.engine.messages import Submit


@dataclass(slots=True, eq=False)
class Pool:
    """The final states of a prompt's tokens as they become one vector.

    They are added in the order of the tokens, each once, in float64. So the vector does not depend
    on the chunks in which they are computed, nor on preemptions.

    Attributes:
        takes_all: whether the vector is the mean over all tokens, and not the last one's state.
        has_unit_length: whether the vector is scaled to length 1; one of zeros stays as it is.
        tokens: number of tokens whose states have been added; never falls.
        total: float64 [hidden], the sum; None before the first.
    """

    takes_all: bool
    has_unit_length: bool = False
    tokens: int = 0
    total: NDArray[np.float64] | None = None

    def add(self, start: int, states: NDArray[np.float32]) -> None:
        """Adds states [n, hidden] of the tokens from index `start` on, except those added before.

        Without `takes_all` the last of them takes the place of all before.
        """
        if not self.takes_all:
            self.tokens, self.total = start + len(states), states[-1].astype(np.float64)
            return
        assert start <= self.tokens, "the state of a token is missing"
        for state in states[self.tokens - start :]:
            self.total = state.astype(np.float64) if self.total is None else self.total + state
            self.tokens += 1

    def vector(self) -> NDArray[np.float32]:
        """The vector, float32 [hidden]."""
        assert self.total is not None, "no state was added"
        whole = self.total / self.tokens if self.takes_all else self.total
        length = math.sqrt(float((whole * whole).sum())) if self.has_unit_length else 0.0
        return (whole / length if length else whole).astype(np.float32)


def pool_of(submit: Submit) -> Pool | None:
    """What collects the states for a request; None if it generates tokens."""
    if not submit.pooling:
        return None
    return Pool(submit.pooling == "mean", submit.unit_length)
