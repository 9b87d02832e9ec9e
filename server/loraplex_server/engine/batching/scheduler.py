"""Who computes what in the next step.

Continuous batching: every step first gives each decoding request its one token, then fills what is
left of the token budget with chunks of prompts. Requests are served by priority, then by arrival;
nobody overtakes. When KV blocks run out while decoding, the request that would be served last gives
its blocks back and waits again; what it has generated stays, and is computed anew as if it were
prompt. The first in order is never put back by another, and no request larger than the whole cache
gets in, so somebody always moves on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.request import Request, RequestState


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the engine.

    Attributes:
        token_budget: tokens of one step, decode rows and prefill chunks together.
        max_running: requests that take part in steps.
        max_waiting: requests that wait to be started; more are refused.
        max_waiting_tokens: their prompt tokens; a prompt beyond it is refused unless nothing waits.
        prompt_logprob_rows: longest prefill chunk whose every token's logits are kept.
    """

    token_budget: int = 512
    max_running: int = 64
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 18
    prompt_logprob_rows: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.token_budget:
            raise ValueError("max_running must be between 1 and token_budget")
        if min(self.max_waiting, self.max_waiting_tokens, self.prompt_logprob_rows) < 1:
            raise ValueError("every limit must be positive")


class Logits(Enum):
    """Which tokens of a row need logits."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a step: `count` of its own tokens from the `start`-th on."""

    request: Request
    start: int
    count: int
    logits: Logits

    @property
    def completes(self) -> bool:
        """Whether all known tokens are computed after this, so that a next one is chosen."""
        return self.start + self.count == len(self.request.tokens)


_order = attrgetter("order")


class Scheduler:
    """The queue of startable requests, the running requests, and the KV blocks between them."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0

    def enqueue(self, request: Request) -> None:
        """Takes a request that can start as soon as there is room."""
        request.state = RequestState.QUEUED
        insort(self.queue, request, key=_order)

    def remove(self, request: Request) -> None:
        """Forgets a queued or running request and frees its blocks."""
        if request.state is RequestState.QUEUED:
            _take(self.queue, request)
        elif request.state is RequestState.RUNNING:
            _take(self.running, request)
            self._free(request)

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step, those with an equal mix side by side."""
        rows: list[Row] = []
        self._schedule_decodes(rows)
        budget = self.limits.token_budget - len(rows)
        for request in self.running:
            if budget and request.remaining > 1:
                budget -= self._chunk(request, budget, rows)
        self._admit(budget, rows, now)
        rows.sort(key=lambda row: row.request.mix)
        return rows

    def _schedule_decodes(self, rows: list[Row]) -> None:
        """Adds every decode row, putting back the last in order if it needs a block."""
        at = 0
        while at < len(self.running):
            request = self.running[at]
            at += 1
            if request.remaining > 1:
                continue
            while not self._grow(request):
                victim = self.running.pop()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                rows.append(Row(request, request.computed, 1, Logits.LAST))

    def _grow(self, request: Request) -> bool:
        """Makes sure that the blocks hold all tokens; False if there are not enough."""
        missing = self.pool.blocks_for(request.in_own_blocks) - len(request.blocks)
        if missing > self.pool.free:
            return False
        if missing > 0:
            request.blocks.extend(self.pool.reserve(missing))
        return True

    def _chunk(self, request: Request, budget: int, rows: list[Row]) -> int:
        """Adds the next piece of a prompt; returns its length."""
        count = min(request.remaining, budget)
        if request.wants_prompt_logits:
            count = min(count, self.limits.prompt_logprob_rows)
        if request.wants_prompt_logits and request.computed + count >= request.scored:
            logits = Logits.ALL
        else:
            logits = Logits.LAST if count == request.remaining else Logits.NONE
        rows.append(Row(request, request.computed, count, logits))
        return count

    def _admit(self, budget: int, rows: list[Row], now: float) -> None:
        """Starts queued requests, strictly in order, while budget, places and blocks last.

        Beyond the blocks it needs, a newcomer leaves one for each running request, lest the next
        step put it back.
        """
        started = 0
        for request in self.queue:
            if not budget or len(self.running) >= self.limits.max_running:
                break
            need = self.pool.blocks_for(request.in_own_blocks)
            if need + len(self.running) > self.pool.free and self.running:
                break
            self._grow(request)
            request.state = RequestState.RUNNING
            insort(self.running, request, key=_order)
            if request.queue_seconds is None:
                request.queue_seconds = now - request.arrived
            budget -= self._chunk(request, budget, rows)
            started += 1
        del self.queue[:started]

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.computed = 0
        self.preemptions += 1
        self.enqueue(request)

    def _free(self, request: Request) -> None:
        self.pool.release(request.blocks)
        del request.blocks[:]


def _take(ordered: list[Request], request: Request) -> None:
    at = bisect_left(ordered, request.order, key=_order)
    assert ordered[at] is request, "a request is not where its state says"
    del ordered[at]
