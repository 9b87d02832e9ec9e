"""The scheduler: which tokens of which requests are computed in the next step.

Continuous batching: every step first computes one token for each decoding request, then fills the
rest of the token budget with chunks of prompts. Requests are served in the order of their arrival,
each level of priority counting as `PRIORITY_SECONDS` of waiting; none overtakes another. So however
many requests of a higher priority keep arriving, a request is overtaken only by those that arrive
within a bounded time after it. When KV blocks run out while decoding, the request that is last in
order returns its blocks and queues again (preemption); its generated tokens stay and are recomputed
as if they were prompt. The first in order is never preempted for another, and no request larger
than the whole cache is accepted, so at least one request always makes progress.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

import msgspec

from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.prefix_cache import PrefixCache
from loraplex_server.engine.batching.prefix_tree import KeptBlock, Root
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.turns import Turns

PRIORITY_SECONDS = 0.1
"""Seconds of waiting that one level of priority is worth."""

NARROW_STEPS = 32
"""Number of steps with fewer tokens after a step for which device memory did not suffice."""


class EngineLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the engine.

    Attributes:
        token_budget: tokens of one step, decode rows and prefill chunks together.
        max_running: requests that take part in a step.
        max_waiting: requests that wait for their first step; more are refused.
        max_waiting_tokens: prompt tokens of the waiting requests; a prompt beyond it is refused
            unless nothing waits.
        prompt_logprob_rows: prompt tokens of one step whose logits are all kept, of all requests
            together.
        prefix_cache: whether requests that begin alike share blocks; see `prefix_cache`.
    """

    token_budget: int = 512
    max_running: int = 64
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 18
    prompt_logprob_rows: int = 128
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.token_budget:
            raise ValueError("max_running must be between 1 and token_budget")
        if min(self.max_waiting, self.max_waiting_tokens, self.prompt_logprob_rows) < 1:
            raise ValueError("every limit must be positive")


class Logits(Enum):
    """The tokens of a row for which logits are computed."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One request's part of a step: `count` of its own tokens from index `start` on.

    A row never extends over the request's `active_from`.
    """

    request: Request
    start: int
    count: int
    logits: Logits

    @property
    def mix(self) -> tuple[tuple[int, float], ...]:
        """`(slot, weight)` pairs of the adapters that compute it; () for the base alone."""
        return self.request.mix if self.start >= self.request.active_from else ()

    @property
    def completes(self) -> bool:
        """Whether all tokens are computed after this step, so that the next one is chosen."""
        return self.start + self.count == len(self.request.tokens)


_order = attrgetter("order")

_Coming = set[tuple[KeptBlock | Root, Hashable]]
"""Blocks that running requests are about to keep; see `PrefixCache.awaits`."""


class Scheduler:
    """Queued and running requests, both in serving order, and their KV blocks.

    Attributes:
        prefixes: blocks of the pool that are kept for requests that begin alike.
        turns: running requests whose last token is computed and whose next one is not chosen yet.
    """

    def __init__(self, pool: BlockPool, limits: EngineLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.prefixes = PrefixCache(pool, limits.prefix_cache)
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.turns = Turns()
        self.preemptions = 0
        self._token_budget = limits.token_budget
        self._narrow_steps = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running."""
        return not self.queue and not self.running

    def enqueue(self, request: Request) -> None:
        """Adds a request that can start as soon as there is room for it."""
        request.state = RequestState.QUEUED
        insort(self.queue, request, key=_order)

    def remove(self, request: Request) -> None:
        """Removes a queued or running request and frees its blocks. No effect on others."""
        if request.state is RequestState.QUEUED:
            _take(self.queue, request)
        elif request.state is RequestState.RUNNING:
            _take(self.running, request)
            self._free(request)
        self.prefixes.end(request)

    def settle(self, row: BatchRow) -> None:
        """Records that a row is computed, before its results are given to its request.

        A request that was preempted since the row was scheduled is queued now, and has no blocks:
        it is admitted again by a later `schedule`, when no pass with a row of it is under way.
        """
        request = row.request
        if request.state is RequestState.RUNNING:
            self.prefixes.keep(request, row.start + row.count)

    def narrow(self, tokens: int) -> None:
        """Limits each of the next `NARROW_STEPS` steps to `tokens`, but at least to one."""
        self._token_budget = max(1, min(tokens, self._token_budget))
        self._narrow_steps = NARROW_STEPS

    def schedule(self, now: float) -> list[BatchRow]:
        """The rows of the next step; rows with an equal mix are adjacent.

        Calling it again without computing the rows gives them again, as far as the budget allows.
        """
        rows: list[BatchRow] = []
        self._schedule_decodes(rows)
        budget = self._token_budget - len(rows)
        coming: _Coming = set()
        for request in self.running:
            if not budget:
                break
            if not self.prefixes.awaits(request, coming) and request.remaining > 1:
                budget -= self._chunk(request, budget, rows)
        self._admit(budget, rows, coming, now)
        rows.sort(key=lambda row: row.mix)
        if self._narrow_steps and rows:
            self._narrow_steps -= 1
            if not self._narrow_steps:
                self._token_budget = self.limits.token_budget
        return rows

    def _schedule_decodes(self, rows: list[BatchRow]) -> None:
        """Adds every decode row; preempts the last in order while a row lacks a block.

        The budget has room for all of them, unless memory has run out lately.
        """
        at = 0
        while at < len(self.running) and len(rows) < self._token_budget:
            request = self.running[at]
            at += 1
            if request.remaining != 1:  # a part of its prompt is missing, or it waits for its turn
                continue
            while not self._grow(request):
                victim = self.running.pop()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                rows.append(BatchRow(request, request.computed, 1, Logits.LAST))

    def _grow(self, request: Request) -> bool:
        """Reserves the blocks that all its tokens need; False if too few are free."""
        missing = self.pool.blocks_for(request.in_own_blocks) - len(request.blocks)
        if missing > self.pool.free:
            return False
        if missing > 0:
            request.blocks.extend(self.pool.reserve(missing))
        return True

    def _chunk(self, request: Request, budget: int, rows: list[BatchRow]) -> int:
        """Adds the next chunk of a prompt, if it may have one; returns its number of tokens."""
        count = min(request.remaining, budget)
        if request.computed < request.active_from:  # all tokens of a row have the same mix
            count = min(count, request.active_from - request.computed)
        if request.wants_prompt_logits:
            scored = sum(row.count for row in rows if row.logits is Logits.ALL)
            count = min(count, self.limits.prompt_logprob_rows - scored)
            if count <= 0:
                return 0
        if request.wants_prompt_logits and request.computed + count >= request.scored:
            logits = Logits.ALL
        else:
            logits = Logits.LAST if count == request.remaining else Logits.NONE
        rows.append(BatchRow(request, request.computed, count, logits))
        return count

    def _admit(self, budget: int, rows: list[BatchRow], coming: _Coming, now: float) -> None:
        """Starts queued requests, strictly in order, while budget, places and blocks last.

        One free block per running request is left over, so that the next step does not preempt the
        request just started.
        """
        started = 0
        for request in self.queue:
            if not budget or self._is_full() or request.awaits_token:
                break
            found = self.prefixes.find(request)
            # Of the blocks found, those without an owner are the last ones, and count as free.
            owned = bisect_left(found, True, key=lambda node: not self.pool.owners(node.block))
            need = self.pool.blocks_for(request.in_own_blocks) - owned
            if need + len(self.running) > self.pool.free and self.running:
                break
            self._begin(request, now)
            if not self.prefixes.awaits(request, coming):
                budget -= self._chunk(request, budget, rows)
            started += 1
        del self.queue[:started]

    def _begin(self, request: Request, now: float) -> None:
        """Starts a queued request, for which there is room, behind the blocks found for it."""
        self.prefixes.begin(request)
        self._grow(request)
        request.runs += 1
        request.state = RequestState.RUNNING
        insort(self.running, request, key=_order)
        if request.queue_seconds is None:
            request.queue_seconds = now - request.arrived
            request.cached = request.computed

    def _is_full(self) -> bool:
        """Whether no more requests may take part in steps. Those that are finishing do not."""
        most = self.limits.max_running
        if len(self.running) < most:
            return False
        return sum(not request.is_finishing for request in self.running) >= most

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.computed = 0
        self.preemptions += 1
        self.enqueue(request)

    def _free(self, request: Request) -> None:
        self.prefixes.release(request)
        self.turns.drop(request)


def _take(ordered: list[Request], request: Request) -> None:
    at = bisect_left(ordered, request.order, key=_order)
    assert ordered[at] is request, "a request is not where its state says"
    del ordered[at]
