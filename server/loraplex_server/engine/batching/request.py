"""One request inside the engine: what was asked, how far it has come, what it holds.

A request holds three kinds of things, each given and taken back in one place: KV blocks (by the
scheduler), adapter pins (by the residency), and its place in a queue (by whichever has it).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from loraplex_server.engine.messages import Logprobs, Submit

if TYPE_CHECKING:
    from loraplex_server.engine.batching.sampler import Draw


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


@dataclass(frozen=True, slots=True)
class Pin:
    """One request's hold on one adapter."""

    digest: str
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """The virtual tokens that an adapter puts before a prompt, as they lie in the KV cache.

    The blocks belong to the adapter and are only read. The last one, if it is part full, is copied
    into the request's own first block, where the request's tokens go on.

    Attributes:
        count: virtual tokens; the request's own stand at positions `count`, `count + 1`, ...
        shared: the full blocks, with which its block table begins.
        rest: tokens in the part-full block `tail`; 0 and None if there is none.
    """

    count: int = 0
    shared: tuple[int, ...] = ()
    rest: int = 0
    tail: int | None = None

    @staticmethod
    def of(count: int, blocks: tuple[int, ...], block_size: int) -> Prefix:
        """The prefix of `count` tokens in `blocks`."""
        full, rest = divmod(count, block_size)
        return Prefix(count, blocks[:full], rest, blocks[full] if rest else None)


NO_PREFIX = Prefix()


class Request:
    """The state of one request.

    Attributes:
        tokens: the prompt, then what was generated.
        prompt_len: how many of `tokens` are the prompt.
        computed: how many of `tokens` are in the KV cache; falls to 0 at preemption.
        scored: how many prompt tokens have had their log-probability taken, the first one counted
            (it has none); never falls, so nothing is reported twice.
        blocks: the KV blocks it owns, in the order of its tokens (int32).
        prefix: the virtual tokens before its own, set while it holds pins.
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
        "prefix",
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
        self.prefix = NO_PREFIX
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
    def in_own_blocks(self) -> int:
        """Tokens that its own blocks must hold now, with the part-full block's virtual ones."""
        return self.prefix.rest + len(self.tokens)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether prompt log-probabilities are still to be taken."""
        return self.submit.prompt_logprobs is not None and self.scored < self.prompt_len

    @property
    def most_tokens(self) -> int:
        """Tokens of its own that the KV cache can ever hold for it: the last is never computed."""
        return self.prompt_len + self.submit.max_new_tokens - 1

    def append(self, token: int) -> None:
        """Takes a generated token that does not end the request, or ends it by length."""
        self.tokens.append(token)
        self.draw.saw(token)
