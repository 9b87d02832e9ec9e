"""One request inside the engine: what was asked, how far it has come, what it holds.

A request holds three kinds of things, each given and taken back in one place: KV blocks (by the
scheduler), adapter pins (by the residency), and its place in a queue (by whichever has it).
"""

from __future__ import annotations

from array import array
from enum import Enum
from typing import TYPE_CHECKING

from loraplex_server.engine.messages import Logprobs, Submit

if TYPE_CHECKING:
    from loraplex_server.engine.sampler import Draw
    from loraplex_server.engine.slots import Pin


class RequestState(Enum):
    """Where a request is. `FETCHING` and `QUEUED` wait; only `QUEUED` and `RUNNING` hold pins."""

    FETCHING = "fetching"
    """Waits until its adapters are on the device."""
    QUEUED = "queued"
    """Waits for KV blocks and a place among the running, for the first time or after preemption."""
    RUNNING = "running"
    """Owns KV blocks and takes part in steps."""
    DONE = "done"
    """Has had its last output; holds nothing."""


class Request:
    """The state of one request.

    Attributes:
        tokens: the prompt, then what was generated.
        prompt_len: how many of `tokens` are the prompt.
        computed: how many of `tokens` are in the KV cache; falls to 0 at preemption.
        scored: how many prompt tokens have had their log-probability taken, the first one counted
            (it has none); never falls, so nothing is reported twice.
        blocks: the KV blocks it owns, in the order of its tokens (int32).
        mix: `(slot, weight)` pairs, set while it holds pins.
        order: sorts before whatever must be served later: by priority, then by arrival.
        draw: the sampling parameters at work.
    """

    __slots__ = (
        "arrived",
        "blocks",
        "computed",
        "draw",
        "id",
        "mix",
        "order",
        "pins",
        "prompt_len",
        "prompt_logprobs",
        "queue_seconds",
        "scored",
        "state",
        "stops",
        "submit",
        "tokens",
    )

    def __init__(self, submit: Submit, arrival: int, now: float, draw: Draw) -> None:
        """`arrival` counts requests, `now` is in seconds of the engine's clock."""
        self.id = submit.id
        self.submit = submit
        self.tokens = array("i", submit.token_ids)
        self.prompt_len = len(submit.token_ids)
        self.computed = 0
        self.scored = 1
        self.prompt_logprobs: list[Logprobs] = []
        self.blocks = array("i")
        self.pins: tuple[Pin, ...] = ()
        self.mix: tuple[tuple[int, float], ...] = ()
        self.order = (-submit.priority, arrival)
        self.arrived = now
        self.queue_seconds: float | None = None
        self.state = RequestState.FETCHING if submit.adapters else RequestState.QUEUED
        self.stops = frozenset(submit.stop_token_ids)
        self.draw = draw

    @property
    def generated(self) -> int:
        """How many tokens it has been given so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that must be computed before the next one can be chosen; 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether prompt log-probabilities are still to be taken."""
        return self.submit.prompt_logprobs is not None and self.scored < self.prompt_len

    @property
    def most_tokens(self) -> int:
        """Tokens it can ever hold in the KV cache: the last one generated is never computed."""
        return self.prompt_len + self.submit.max_new_tokens - 1

    def append(self, token: int) -> None:
        """Takes a generated token that does not end the request, or ends it by length."""
        self.tokens.append(token)
        self.draw.saw(token)
