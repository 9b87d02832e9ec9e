"""The masks of structured output, as the passes use them.

Masks are computed by threads while the forward pass runs (`refill`), so they are mostly there when
its logits are. A row whose mask is late is held (`Turns.held`): it keeps its logits and stays out
of passes until the mask is there, so that no grammar delays the rows of others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.messages import Failure, Structure
from loraplex_server.engine.structures.constraint import Constraint
from loraplex_server.engine.structures.structures import Structures

SHARE = 0.02
"""Time that a step may wait for late masks, as a fraction of the time that it has taken."""
PATIENCE = 0.05
"""Most seconds of a wait for a mask if there is nothing else to do; then messages are looked at."""


class Masks:
    """What the next tokens of an engine's requests may be."""

    def __init__(self, structures: Structures) -> None:
        self._structures = structures

    def is_ready(self, request: Request) -> bool:
        """Whether the request's next token can be chosen, or it is known that none can."""
        return request.constraint is None or request.constraint.ready

    def restrict(self, request: Request) -> Failure | None:
        """Restricts the request's next choice; returns why it has to end, or None."""
        constraint = request.constraint
        if constraint is None:
            return None
        if constraint.failure is None:
            request.draw.allow(constraint.mask)
        return constraint.failure

    def advance(self, request: Request, token: int) -> tuple[bool, Failure | None]:
        """Notes a chosen token; returns whether the text is complete, and why it has to end."""
        constraint, structure = _both(request)
        is_last = request.generated + 1 == request.submit.max_new_tokens
        is_complete, failure = self._structures.advance(constraint, structure, token, is_last)
        return is_complete, failure

    def refill(self) -> None:
        """Starts the computation of the masks that are out of date.

        Threads that compute masks would hold up what is done between two forward passes.
        """
        self._structures.refill()

    def await_some(
        self, held: Collection[Request], rows: Iterable[Request], step_seconds: float
    ) -> None:
        """Waits for late masks: a little, or, if the step had no rows, until one is there.

        `rows` are the requests of the pass that was read and of the one that is under way.
        """
        constraints = [_both(request)[0] for request in held]
        if any(True for _ in rows):
            self._structures.wait(constraints, SHARE * step_seconds)
        else:
            self._structures.wait(constraints, PATIENCE, any)


def _both(request: Request) -> tuple[Constraint, Structure]:
    structure = request.submit.structure
    assert request.constraint is not None, "a request without structured output"
    assert structure is not None, "a request without structured output"
    return request.constraint, structure
