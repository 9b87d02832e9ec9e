"""The scheduler: which tokens of which requests are computed in the next step.

Continuous batching: every step first computes one token for each decoding request, then fills the
rest of the token budget, or as much of it as `StepCosts` has time for, with chunks of prompts. The
prompt of the account with the smallest counter comes first, whether it has begun or waits in the
`FairQueue`; equal counters are served in order. Nobody is skipped because a later request is
smaller.

When KV blocks run out while decoding, a request returns its blocks and queues again (preemption):
the last in order of the account with the largest counter. Its generated tokens stay and are
recomputed as if they were prompt. The running request that is first in order is never preempted for
another, and no request larger than the whole cache is accepted, so at least one request always
makes progress.

While several accounts send requests, `Shares` says what each of them leaves to the others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Hashable
from operator import attrgetter

from loraplex_server.engine.batching.fair_queue import Account, FairQueue
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.prefix_cache import PrefixCache
from loraplex_server.engine.batching.prefix_tree import KeptBlock, Root
from loraplex_server.engine.batching.request import BatchRow as BatchRow
from loraplex_server.engine.batching.request import Logits as Logits
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.shares import PROMPT_PARTS, Shares
from loraplex_server.engine.batching.step_costs import StepCosts
from loraplex_server.engine.batching.turns import Turns

ACTIVE_SECONDS = 10.0
"""Seconds for which an account counts as sending requests after its last one."""

NARROW_STEPS = 32
"""Number of steps with fewer tokens after a step for which device memory did not suffice."""


_order = attrgetter("order")

_Coming = set[tuple[KeptBlock | Root, Hashable]]
"""Blocks that running requests are about to keep; see `PrefixCache.awaits`."""


class Scheduler:
    """Queued and running requests, and their KV blocks.

    Attributes:
        prefixes: blocks of the pool that are kept for requests that begin alike.
        running: the running requests, in order.
        turns: running requests whose last token is computed and whose next one is not chosen yet.
        costs: what steps cost; whoever measures them notes it there.
        held_up: whether the last step left requests waiting for a place or for blocks.
        passed_at: time of the last step that left requests waiting for anything.
    """

    def __init__(self, pool: BlockPool, limits: EngineLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.prefixes = PrefixCache(pool, limits.prefix_cache)
        self.queue = FairQueue(limits.fair_weights)
        self.running: list[Request] = []
        self.turns = Turns()
        self.costs = StepCosts(limits.prompt_step_ratio)
        self.preemptions = 0
        self.held_up = False
        self.passed_at = float("-inf")
        self._token_budget = limits.token_budget
        self._narrow_steps = 0
        self._left_some_out = False

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running."""
        return not self.queue and not self.running

    @property
    def places(self) -> int:
        """Number of requests that may start now, as far as places and blocks decide that."""
        return 0 if self.held_up else max(0, self.limits.max_running - len(self.running))

    def enqueue(self, request: Request) -> None:
        """Adds a request that can start as soon as there is room for it."""
        request.state = RequestState.QUEUED
        self.queue.join(request)

    def set_aside(self, request: Request) -> None:
        """Lets a request wait for its adapters, if it was queued, as if it had not been."""
        if request.state is RequestState.QUEUED:
            self.queue.drop(request)
            request.state = RequestState.FETCHING

    def remove(self, request: Request) -> None:
        """Removes a queued or running request and frees its blocks. No effect on others."""
        if request.state is RequestState.QUEUED:
            self.queue.drop(request)
        elif request.state is RequestState.RUNNING:
            _take(self.running, request)
            self._free(request)
            self.queue.leave(request)
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
        shares = None
        prompts = [each for each in self.running if len(each.tokens) > each.computed + 1]
        if (prompts or self.queue) and self.queue.is_shared(now - ACTIVE_SECONDS):
            most, least = self.limits.max_running, self.queue.least_weight
            shares = Shares(self.running, most, self.pool.num_blocks, least)
        left_out = self._left_out(shares, prompts)
        if left_out:
            prompts = [each for each in prompts if _top(each) not in left_out]
            budget = min(self._token_budget // 2, self._token_budget - len(self.running))
            self._schedule_prompts(prompts, budget, rows, now, shares, left_out)
        self._left_some_out = bool(rows)
        prompts = self._schedule_decodes(rows, left_out if rows else ())
        if not self._left_some_out:
            budget = self.costs.allowance(len(rows), self._token_budget - len(rows))
            if not rows and shares is not None and shares.has_majority(prompts, self.queue.waiting):
                budget = -(-budget // PROMPT_PARTS)
            self._schedule_prompts(prompts, budget, rows, now, shares)
        rows.sort(key=_mix)
        if self._narrow_steps and rows:
            self._narrow_steps -= 1
            if not self._narrow_steps:
                self._token_budget = self.limits.token_budget
        return rows

    def _left_out(self, shares: Shares | None, prompts: Collection[Request]) -> set[Account]:
        """The accounts without rows in this step, for a prompt of a light one; mostly none."""
        if shares is None or self._left_some_out:
            return set()
        heavy = shares.heavy
        if not heavy:
            return heavy
        is_light = shares.is_light
        begun = any(is_light(request.account) for request in prompts)
        return heavy if begun or any(map(is_light, self.queue.waiting)) else set()

    def _schedule_decodes(
        self, rows: list[BatchRow], left_out: Collection[Account] = ()
    ) -> list[Request]:
        """Adds every decode row; returns the running requests with a part of a prompt to compute.

        Rows of the accounts in `left_out` are not added. Requests are preempted while a row lacks a
        block. The budget has room for all rows, unless memory has run out lately.
        """
        prompts: list[Request] = []
        placed = {row.request for row in rows}
        size, budget, add = self.pool.block_size, self._token_budget, self._add
        for request in self.running.copy():
            start = request.computed
            remaining = len(request.tokens) - start
            if request.state is not RequestState.RUNNING:
                continue  # it has been preempted for a row before it
            if request in placed or (left_out and _top(request) in left_out):
                continue
            if remaining == 1:
                if len(rows) < budget and (
                    len(request.blocks) * size >= request.prefix.rest + start + 1
                    or self._make_room(request, rows)
                ):
                    add(BatchRow.next(request, 1), rows)
            elif remaining > 1:
                prompts.append(request)
        return [each for each in prompts if each.state is RequestState.RUNNING]

    def _make_room(self, request: Request, rows: list[BatchRow]) -> bool:
        """Reserves the blocks of a decode row; False if the request itself was preempted."""
        while request.state is RequestState.RUNNING:
            if self._grow(request):
                return True
            first, *others = self.running
            self._preempt(max(others, key=_by_counter, default=first), rows)
        return False

    def _grow(self, request: Request) -> bool:
        """Reserves the blocks that all its tokens need; False if too few are free."""
        missing = self.pool.blocks_for(request.in_own_blocks) - len(request.blocks)
        if missing > self.pool.free:
            return False
        if missing > 0:
            request.blocks.extend(self.pool.reserve(missing))
        return True

    def _schedule_prompts(
        self,
        prompts: list[Request],
        budget: int,
        rows: list[BatchRow],
        now: float,
        shares: Shares | None,
        left_out: Collection[Account] = (),
    ) -> None:
        """Gives the budget to `prompts`, which have begun, and to queued requests, which start."""
        may_start = bool(self.queue)
        self.held_up &= may_start
        coming: _Coming = set()
        if prompts or may_start:
            for request in self.running:
                if request.remaining <= 1:
                    self.prefixes.awaits(request, coming)
        while budget > 0:
            prompt = min(prompts, key=_by_counter, default=None)
            found = self._next_start(shares, left_out) if may_start else None
            if found is None:
                may_start = False
            elif prompt is None or found[1] or _by_counter(found[0]) < _by_counter(prompt):
                may_start = self._start(found[0], rows, now, shares)
                if may_start:
                    budget -= self._next_chunk(found[0], budget, rows, coming)
                    may_start = bool(self.queue)
                    prompts = [each for each in prompts if each.state is RequestState.RUNNING]
                continue
            if prompt is None:
                break
            prompts.remove(prompt)
            budget -= self._next_chunk(prompt, budget, rows, coming)
        if self.queue:
            self.passed_at = now

    def _next_start(
        self, shares: Shares | None, left_out: Collection[Account]
    ) -> tuple[Request, bool] | None:
        """The queued request that starts next, as far as places decide; see `FairQueue.first`."""
        free, found = self._free_places, None
        if shares is None:
            found = self.queue.first() if free > 0 else None
        else:
            barred = shares.barred(free, self.pool.free).union(left_out)
            if free <= 0 and shares.heaviest is not None:
                barred.update(each for each in self.queue.waiting if not shares.is_light(each))
                found = self.queue.first(barred)
            elif free > 0:
                found = self.queue.first(barred)
        self.held_up = found is None
        return found

    @property
    def _free_places(self) -> int:
        """Places for requests that start. Those that are finishing take none, as they are done."""
        free = self.limits.max_running - len(self.running)
        return free if free > 0 else free + sum(request.is_finishing for request in self.running)

    def _next_chunk(
        self, request: Request, budget: int, rows: list[BatchRow], coming: _Coming
    ) -> int:
        """As `_chunk`, unless another request is computing what this one can share."""
        if self.prefixes.awaits(request, coming):
            return 0
        return self._chunk(request, budget, rows)

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
        self._add(BatchRow.next(request, count), rows)
        return count

    def _add(self, row: BatchRow, rows: list[BatchRow]) -> None:
        """Adds a row, and charges it."""
        rows.append(row)
        account = row.request.account
        assert account is not None, "a running request has no account"
        row.request.charged = max(row.request.charged, row.start)  # what others computed is free
        account.charge(row.request, row.start + row.count)

    def _start(
        self, request: Request, rows: list[BatchRow], now: float, shares: Shares | None
    ) -> bool:
        """Starts a queued request if there are blocks for it; else it is waited for.

        One free block per running request is left over, so that the next step does not preempt the
        request just started.
        """
        if request.awaits_token:
            return False
        found = self.prefixes.find(request)
        # Of the blocks found, those without an owner are the last ones, and count as free.
        owned = bisect_left(found, True, key=lambda node: not self.pool.owners(node.block))
        need = self.pool.blocks_for(request.in_own_blocks) - owned
        if need + len(self.running) > self.pool.free and self.running:
            self.held_up = True
            return False
        if shares is not None:
            if self._free_places <= 0:
                heaviest = shares.heaviest
                self._preempt([r for r in self.running if _top(r) is heaviest][-1], rows)
            shares.note_start(request)
        self._begin(request, now)
        return True

    def _begin(self, request: Request, now: float) -> None:
        """Starts a queued request, for which there is room, behind the blocks found for it."""
        self.prefixes.begin(request)
        self._grow(request)
        request.runs += 1
        self.queue.take(request)
        request.state, request.begun = RequestState.RUNNING, now
        insort(self.running, request, key=_order)
        if request.queue_seconds is None:
            request.queue_seconds = now - request.arrived
            request.cached = request.computed

    def _preempt(self, request: Request, rows: list[BatchRow]) -> None:
        """Puts a running request back into the queue, and takes its row from those of this step."""
        rows[:] = [row for row in rows if row.request is not request]
        _take(self.running, request)
        self._free(request)
        request.computed = 0
        self.preemptions += 1
        request.state = RequestState.QUEUED
        self.queue.put_back(request)

    def _free(self, request: Request) -> None:
        self.prefixes.release(request)
        self.turns.drop(request)


def _mix(row: BatchRow) -> tuple[tuple[int, float], ...]:
    """As `BatchRow.mix`."""
    request = row[0]
    return request.mix if row[1] >= request.active_from else ()


def _top(request: Request) -> Account:
    """The account of a request that is compared with those of other callers."""
    assert request.account is not None, "a request without an account is scheduled"
    return request.account.top


def _by_counter(request: Request) -> tuple[float, float, tuple[float, int]]:
    """Sort key: the counters of the account that it is charged to, then its order."""
    account = request.account
    assert account is not None, "a request without an account is scheduled"
    return account.top.counter, account.counter, request.order


def _take(ordered: list[Request], request: Request) -> None:
    at = bisect_left(ordered, request.order, key=_order)
    assert ordered[at] is request, "a request is not where its state says"
    del ordered[at]
