"""Turns of the rows whose next token is costly to choose, so that they hardly slow other rows.

With a high temperature and top-p, choosing a token sorts most of the vocabulary, which takes
milliseconds; with 60 such rows a step would spend more time on sampling than on the forward pass,
and every other row would wait. Such rows take turns instead: in a step that other rows take part
in, costly sampling may take `SHARE` of the time of the rest of the step. A row without a turn keeps
its logits and stays out of the forward passes until its turn comes. Turns are first come, first
served, and every step adds to the time that may be spent, so each row gets its turn. The tokens are
those of a step without other rows: they depend on the row's logits and seed alone.

A row whose mask of structured output is not computed yet is held in the same way until it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_server.engine.batching.request import Request
    from loraplex_server.engine.batching.sampler import Floats

SHARE = 1 / 3
"""Time for costly sampling, as a fraction of the time that the rest of the step takes."""


class Turns:
    """Requests whose logits wait to be sampled, the longest waiting first.

    Attributes:
        held: requests that wait for their masks, with their logits [vocab]; they have no turn.
    """

    def __init__(self) -> None:
        self._waiting: dict[Request, Floats] = {}
        self.held: dict[Request, Floats] = {}
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, request: Request, logits: Floats) -> None:
        """Adds a request that waits for its turn; `logits` [vocab] are copied."""
        self._waiting[request] = logits.copy()

    def hold(self, request: Request, logits: Floats) -> None:
        """Adds a request that waits for its mask; `logits` [vocab] are copied."""
        self.held[request] = logits.copy()

    def drop(self, request: Request) -> None:
        """Removes a request and its logits. No effect if it does not wait."""
        self._waiting.pop(request, None)
        self.held.pop(request, None)

    def take(self) -> tuple[Request, Floats]:
        """Removes and returns the request whose turn it is, and its logits."""
        request = next(iter(self._waiting))
        return request, self._waiting.pop(request)

    def earn(self, step_seconds: float) -> None:
        """Begins a step whose other parts took `step_seconds`. Time that was left over is lost."""
        self._seconds = min(self._seconds, 0.0) + SHARE * step_seconds

    def spend(self, seconds: float) -> None:
        """Notes that a turn took `seconds`."""
        self._seconds -= seconds

    @property
    def is_over(self) -> bool:
        """Whether this step's time is used up."""
        return self._seconds < 0.0
