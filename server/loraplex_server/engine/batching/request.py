"""One request inside the engine: its parameters, its progress, the resources it holds, its rows.

A request holds three kinds of resources. Each kind has one owner that grants and takes back:

    KV blocks            Scheduler
    adapter pins         Residency
    place in a queue     Wants (FETCHING), Scheduler.queue (QUEUED), Scheduler.running (RUNNING)
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loraplex_server.engine.messages import Logprobs, Submit

if TYPE_CHECKING:
    from loraplex_server.engine.batching.fair_queue import Account
    from loraplex_server.engine.batching.prefix_tree import KeptBlock, Root
    from loraplex_server.engine.batching.sampler import Draw
    from loraplex_server.engine.structures.constraint import Constraint


class RequestState(Enum):
    """Stage of a request. Adapter pins are held in `QUEUED` and `RUNNING` only."""

    FETCHING = "fetching"
    """Some of the request's adapters are not on the device yet."""
    QUEUED = "queued"
    """The request waits for KV blocks and a place in the batch, at first or after preemption."""
    RUNNING = "running"
    """The request owns KV blocks and takes part in steps."""
    DONE = "done"
    """The request has had its last output and holds nothing."""


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


@dataclass(slots=True)
class MergeState:
    """Whether an adapter's dense copies are in use, which round otherwise than its factors.

    Attributes:
        merge: 0 without copies; otherwise a number that no other merge of the engine has.
        changes: number of merges and unmerges of the adapter since it came onto the device.
    """

    merge: int = 0
    changes: int = 0

    def change(self, merge: int) -> None:
        """Notes that the copies of merge number `merge` are in use from now on; 0: none are."""
        self.merge = merge
        self.changes += 1


class PoolState(Protocol):
    """How far the states of a prompt's tokens have become one vector; see `passes.pooling`."""

    takes_all: bool
    tokens: int


@dataclass(slots=True, eq=False)
class Request:
    """The state of one request.

    Attributes:
        order: sort key within its account; smaller is served earlier: the time of arrival less the
            seconds that the priority is worth, then the number of the arrival.
        arrived: time of arrival on the engine's clock.
        draw: state of sampling.
        tokens: the prompt, then the generated tokens (int32). The last `pending` ones are not known
            to the host yet: -1 - k stands for the token of draw k of the launch that chooses it.
        pending: number of `tokens` that are not known yet.
        awaits_token: its next token is being chosen and has no place in `tokens` yet, so nothing
            can be scheduled for it.
        computed: number of `tokens` in the KV cache, once the launches under way have run; 0 again
            after preemption.
        scored: number of prompt tokens whose log-probability has been taken, counting the first
            (it has none); never falls, so none is reported twice.
        blocks: KV blocks that the request owns, in the order of its tokens (int32).
        pins: adapters that it was granted; they are pinned until it ends.
        prefix: virtual tokens before its own, of its adapter.
        mix: `(slot, weight)` pairs of its adapters.
        active_from: index in `tokens` from which on `mix` applies; the base alone computes the
            tokens before. `NEVER` if it computes all of them. See `activation`.
        copies: whether the dense copies of its adapter are in use, if it has just one.
        merges_seen: `copies.changes` when it was last admitted.
        root: the root of its tree in the prefix cache, as it was last admitted or looked up.
        path: those of its first blocks that are kept. See `prefix_cache`.
        found: while it is queued, the blocks that were last found for it; it does not own them.
        cached: number of its first tokens whose keys and values were not computed for it, since
            they were found in the KV cache before its first answer.
        to_compute: number of its prompt's tokens that it is expected to compute, by what was in the
            KV cache when it was queued; 0 if it has no deadline.
        runs: number of times that it was admitted.
        queue_seconds: time from its arrival to its first step; None before that.
        awaits_load: whether some of its adapters were not on the device when it arrived.
        load_seconds: time from its arrival until they were all there; 0 if they were there.
        short_positions: as in the base's `DecoderConfig`; 0 if all sequences are alike.
        constraint: what its next token may be; None if it may be any.
        account: whom its tokens are charged to; None before it is queued.
        begun: time of its last start on the engine's clock.
        pool: what becomes its vector; None if tokens are generated.
        charged: number of its first tokens that were charged, or found in the KV cache.
    """

    submit: Submit
    order: tuple[float, int]
    arrived: float
    draw: Draw
    tokens: array[int] = field(init=False)
    stops: frozenset[int] = field(init=False)
    state: RequestState = RequestState.FETCHING
    pending: int = 0
    awaits_token: bool = False
    computed: int = 0
    scored: int = 1
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    blocks: array[int] = field(default_factory=lambda: array("i"))
    pins: tuple[Pin, ...] = ()
    prefix: Prefix = Prefix()
    mix: tuple[tuple[int, float], ...] = ()
    active_from: int = 0
    copies: MergeState = field(default_factory=MergeState)
    merges_seen: int = 0
    root: Root | None = None
    path: list[KeptBlock] = field(default_factory=list)
    found: list[KeptBlock] = field(default_factory=list)
    cached: int = 0
    to_compute: int = 0
    runs: int = 0
    queue_seconds: float | None = None
    awaits_load: bool = False
    load_seconds: float = 0.0
    short_positions: int = 0
    constraint: Constraint | None = None
    account: Account | None = None
    begun: float = 0.0
    charged: int = 0
    pool: PoolState | None = None

    def __post_init__(self) -> None:
        self.tokens = array("i", self.submit.token_ids)
        self.stops = frozenset(self.submit.stop_token_ids)

    @property
    def id(self) -> int:
        """The request's number, given by the front."""
        return self.submit.id

    @property
    def prompt_len(self) -> int:
        """Number of prompt tokens."""
        return len(self.submit.token_ids)

    @property
    def sole_adapter(self) -> str | None:
        """Digest of the adapter that the request uses alone at weight 1; None otherwise."""
        return self.pins[0].digest if len(self.mix) == 1 and self.mix[0][1] == 1.0 else None

    @property
    def generates(self) -> bool:
        """Whether tokens are wanted. Without, its end is that its prompt is computed."""
        return self.submit.max_new_tokens > 0

    @property
    def generated(self) -> int:
        """Number of tokens generated so far, without those that are not known yet."""
        return len(self.tokens) - self.prompt_len - self.pending

    @property
    def next_is_last(self) -> bool:
        """Whether the token after `tokens` ends the request by its length."""
        return len(self.tokens) - self.prompt_len + 1 >= self.submit.max_new_tokens

    @property
    def is_finishing(self) -> bool:
        """Whether the token that is being chosen is its last one, so that nothing follows."""
        return self.awaits_token and self.next_is_last

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next one can be chosen; 1 when decoding.

        0 while the next token is still to be chosen: see `Turns` and `awaits_token`.
        """
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
    def wants_all(self) -> bool:
        """Whether every token has to be computed for it, wherever its keys and values are."""
        if self.pool is not None:
            return self.pool.takes_all and self.pool.tokens < self.prompt_len
        return self.wants_prompt_logits

    @property
    def most_tokens(self) -> int:
        """Upper bound of its own tokens in the KV cache: the last one is never computed."""
        return self.prompt_len + max(1, self.submit.max_new_tokens) - 1

    @property
    def is_long(self) -> bool:
        """Whether the base's frequencies for long sequences apply.

        It follows from the request alone, so keys in the cache are never rotated again.
        """
        return 0 < self.short_positions < self.prefix.count + self.most_tokens

    def set_back(self) -> None:
        """Goes back to waiting for its adapters, with the tokens that it has; it holds nothing."""
        self.state = RequestState.FETCHING
        self.pins, self.mix, self.prefix = (), (), Prefix()
        self.copies = MergeState()
        self.active_from = 0
        self.computed = 0

    def expect(self, draw: int) -> None:
        """Adds the token that draw `draw` of a launch will choose."""
        self.tokens.append(-1 - draw)
        self.pending += 1

    def append(self, token: int) -> None:
        """Adds a generated token that does not end the request, or learns the first pending one."""
        if self.pending:
            self.tokens[-self.pending] = token
            self.pending -= 1
        else:
            self.tokens.append(token)
        self.draw.saw(token)


class Logits(Enum):
    """What is computed of a row's tokens, beyond keys and values."""

    NONE = "none"
    LAST = "last"
    """The logits of its last token."""
    ALL = "all"
    """The logits of all its tokens."""
    STATE = "state"
    """The final state of its last token."""
    STATES = "states"
    """The final states of all its tokens."""


class BatchRow(NamedTuple):
    """One request's part of a step: `count` of its own tokens from index `start` on.

    A row never extends over the request's `active_from`.
    """

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # takes the place of the method of tuples
    logits: Logits

    @property
    def mix(self) -> tuple[tuple[int, float], ...]:
        """`(slot, weight)` pairs of the adapters that compute it; () for the base alone."""
        return self.request.mix if self.start >= self.request.active_from else ()

    @property
    def completes(self) -> bool:
        """Whether all tokens are computed after this step, so that the next one is chosen."""
        return self.start + self.count == len(self.request.tokens)

    @property
    def states(self) -> int:
        """Number of its tokens whose final states are computed."""
        if self.logits is Logits.STATES:
            return self.count
        return int(self.logits is Logits.STATE)

    @staticmethod
    def next(request: Request, count: int) -> BatchRow:
        """The row of a running request with its next `count` tokens."""
        start, is_last = request.computed, count == request.remaining
        pool = request.pool
        if pool is not None:
            wanted = Logits.STATE if is_last else Logits.NONE
            if pool.takes_all and start + count > pool.tokens:
                wanted = Logits.STATES
        elif request.wants_prompt_logits and start + count >= request.scored:
            wanted = Logits.ALL if count > 1 or not is_last else Logits.LAST
        else:
            wanted = Logits.LAST if is_last else Logits.NONE
        return BatchRow(request, start, count, wanted)
