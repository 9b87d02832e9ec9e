"""One request inside the engine: its parameters, its progress and the resources it holds.

A request holds three kinds of resources. Each kind has one owner that grants and takes back:

    KV blocks            Scheduler
    adapter pins         Residency
    place in a queue     Wants (FETCHING), Scheduler.queue (QUEUED), Scheduler.running (RUNNING)
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
    """Stage of a request. Adapter pins are held in `QUEUED` and `RUNNING` only."""

    FETCHING = "fetching"
    """Its adapters are not all on the device."""
    QUEUED = "queued"
    """It waits for KV blocks and a place among the running requests, first or after preemption."""
    RUNNING = "running"
    """It owns KV blocks and takes part in steps."""
    DONE = "done"
    """It has had its last output and holds nothing."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A request's hold on one adapter: the adapter stays in this slot until it is released."""

    digest: str
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """The virtual tokens that an adapter puts before a prompt, as blocks of the KV cache.

    The blocks belong to the adapter and are read-only. The last one, if it is part full, is copied
    into the request's own first block, and the request's tokens follow there.

        block table:  shared | shared | own (copy of tail, then own tokens) | own | ...

    Attributes:
        count: number of virtual tokens; the request's own start at position `count`.
        shared: the full blocks, with which the request's block table begins.
        rest: number of tokens in the part-full block `tail`; 0 if there is none.
        tail: the part-full block; None if there is none.
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
        tokens: the prompt, then the generated tokens (int32).
        prompt_len: number of prompt tokens.
        computed: number of `tokens` in the KV cache; 0 again after preemption.
        scored: number of prompt tokens whose log-probability has been taken, counting the first
            (it has none); never falls, so none is reported twice.
        blocks: KV blocks that the request owns, in the order of its tokens (int32).
        prefix: virtual tokens before its own; set while it holds pins.
        mix: `(slot, weight)` pairs; set while it holds pins.
        order: sort key; smaller is served earlier. By priority, then by arrival.
        draw: state of sampling.
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
        """`arrival` is the request's number in order of arrival, `now` the engine's clock."""
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
    def sole_adapter(self) -> str | None:
        """Digest of the adapter that the request uses alone at weight 1; None otherwise."""
        return self.pins[0].digest if len(self.mix) == 1 and self.mix[0][1] == 1.0 else None

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next one can be chosen; 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def in_own_blocks(self) -> int:
        """Number of tokens that its own blocks must hold now, the prefix's `rest` included."""
        return self.prefix.rest + len(self.tokens)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether prompt log-probabilities are still to be taken."""
        return self.submit.prompt_logprobs is not None and self.scored < self.prompt_len

    @property
    def most_tokens(self) -> int:
        """Upper bound of its own tokens in the KV cache: the last one is never computed."""
        return self.prompt_len + self.submit.max_new_tokens - 1

    def append(self, token: int) -> None:
        """Adds a generated token that does not end the request."""
        self.tokens.append(token)
        self.draw.saw(token)
