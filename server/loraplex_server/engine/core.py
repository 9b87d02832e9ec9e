"""The engine core: requests in, one step at a time, messages out.

The core decides what lives and what ends; `passes` computes and answers in between.
A plain object without threads, sockets or files of its own. One thread owns it; adapter files are
read by the loader that it is given. Every accepted request that is not aborted has exactly one last
output. However a request ends, `_end` releases its blocks, its pins and its place in a queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.adapters import Adapters
from loraplex_server.engine.adapters.attempts import Announcements
from loraplex_server.engine.adapters.loader import Loader, ThreadLoader
from loraplex_server.engine.adapters.residency import UNLOADED
from loraplex_server.engine.batching.admission import refusal
from loraplex_server.engine.batching.deadlines import Deadlines
from loraplex_server.engine.batching.fair_queue import PRIORITY_SECONDS
from loraplex_server.engine.batching.forecast import LATE, Forecast
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.batching.scheduler import Scheduler
from loraplex_server.engine.batching.step_costs import WorkRates
from loraplex_server.engine.books import check_books
from loraplex_server.engine.messages import (
    Control,
    Failure,
    Reply,
    StepReport,
    Submit,
    Unload,
)
from loraplex_server.engine.passes.answers import NOT_FINITE, Answers, ReadPass
from loraplex_server.engine.passes.choices import Choices
from loraplex_server.engine.passes.lock_step import LockStep, Passes
from loraplex_server.engine.passes.masks import Masks
from loraplex_server.engine.passes.one_ahead import OneAhead
from loraplex_server.engine.passes.pooling import pool_of
from loraplex_server.engine.passes.tally import PassTally
from loraplex_server.engine.reporting import Reporter
from loraplex_server.engine.runner.protocol import ModelRunner, sampler_of, works_ahead
from loraplex_server.engine.statistics import BatchView
from loraplex_server.engine.structures.structures import Structures

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""Number of failed forward passes in a row after which the process should be replaced."""

LATE_SECONDS = 0.1
"""Seconds between two looks for waiting requests that cannot end before their deadlines."""

CHECK_SECONDS = 60.0
"""Seconds after which a busy engine verifies its books; an idle one does so whenever it rests."""

EXPIRED = Failure(Reason.DEADLINE_EXCEEDED, "the deadline passed before the request was finished")
FAULT = Failure(Reason.ENGINE_FAULT, "the model failed to compute this request")


class EngineCore:
    """All decisions of the engine, over a runner that computes.

    Attributes:
        adapters: the adapters' side of the engine.
    """

    def __init__(
        self,
        runner: ModelRunner,
        limits: EngineLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        loader: Loader | None = None,
        attempts: Announcements | None = None,
        structures: Structures | None = None,
        meanwhile: AbstractContextManager[object] | None = None,
    ) -> None:
        """`clock` gives the seconds in which deadlines are; `loader` defaults to threads.

        `attempts` announces work on adapters that the process may not survive. `structures` makes
        the constraints of structured output, by default with the runner's tokenizer. `meanwhile`
        is entered while a runner without `launch` computes a pass; another thread may then call
        `add` and `take_refusals`.
        """
        self._runner = runner
        self._limits = limits or EngineLimits()
        self._clock = clock
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(self._pool, self._limits)
        self._tally = PassTally()
        self._rates = WorkRates()
        self._forecast = Forecast(self._scheduler, self._rates)
        choices = Choices(sampler_of(runner))
        self._structures = structures or Structures(runner.info)
        turns, masks = self._scheduler.turns, Masks(self._structures)
        self._answers = Answers(choices, masks, turns, clock, self._finish, self._fault)
        self._passes = self._choose_passes(runner, meanwhile or nullcontext())
        settle_slot = self._passes.settle_slot
        self.adapters = Adapters(
            runner,
            loader or ThreadLoader(runner),
            clock,
            attempts,
            settle_slot,
            self._limits.adapter_turn,
        )
        take_seconds = self._structures.take_seconds
        self._reporter = Reporter(self._scheduler, self.adapters, self._tally, clock, take_seconds)
        self._requests: dict[int, Request] = {}
        self._deadlines = Deadlines()
        self._arrivals = 0
        self._steps = 0
        self._woken = False
        self._checked_at = self._looked_at = clock()

    def _choose_passes(
        self, runner: ModelRunner, meanwhile: AbstractContextManager[object]
    ) -> Passes:
        """One pass ahead if the runner can; else one after the other."""
        parts = self._scheduler, self._answers, self._tally, self._fault
        if works_ahead(runner):
            return OneAhead(runner, *parts, self._clock)
        return LockStep(runner, *parts, meanwhile)

    # commands

    def add(self, submit: Submit) -> None:
        """Accepts a request, or refuses it in the output of the next step."""
        if submit.id in self._requests:
            text = "request number %d is in use; the second one is dropped"
            log.error(text, submit.id, extra={"request_id": submit.request_id})
            return
        self._woken = True
        cache_tokens = self._pool.num_blocks * self._pool.block_size
        waiting = [r.prompt_len for r in self._requests.values() if r.queue_seconds is None]
        failure = refusal(submit, waiting, self._runner.info, cache_tokens, self._limits)
        if failure is not None:
            self._answers.fail(submit.id, failure)
            return
        self._arrivals += 1
        stops = submit.stop_token_ids
        draw = Draw(submit.sampling, submit.token_ids, stops, submit.min_new_tokens)
        now = self._clock()
        order = (now - submit.priority * PRIORITY_SECONDS, self._arrivals)
        request = Request(submit, order, now, draw)
        request.pool = pool_of(submit)
        request.short_positions = self._runner.info.base.config.short_positions
        if submit.structure is not None:
            request.constraint = self._structures.constrain(submit.structure)
        self._requests[submit.id] = request
        if submit.deadline is not None:
            self._deadlines.add(submit.id, submit.deadline)
        if submit.adapters:
            there = self.adapters.slots.residents
            request.awaits_load = any(ref.digest not in there for ref in submit.adapters)
            # Its wait is no shorter than it would be with its adapters on the device.
            if not self._scheduler.queue or self._enqueue(request, now):
                self._scheduler.set_aside(request)
                self.adapters.want(request)
        else:
            self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> bool:
        """Queues a request or, if its wait would be too long, refuses it and returns False."""
        self._scheduler.enqueue(request)
        failure = self._forecast.refusal(request, now)
        if failure is not None:
            self._end(request, failure)
        return failure is None

    def reject(self, request_id: int) -> None:
        """Fails a request whose `add` raised an exception, however far it came."""
        self._woken = True
        request = self._requests.get(request_id)
        if request is not None:
            try:
                self._end(request)
            except Exception:
                extra = {"request_id": request.submit.request_id}
                log.exception("a failed request could not be ended", extra=extra)
                self._requests.pop(request_id, None)
        self._answers.fail(request_id, FAULT)

    def abort(self, request_id: int) -> None:
        """Ends a request at once and without an output. Unknown ids are ignored."""
        self._answers.withdraw(request_id)
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def control(self, message: Control) -> None:
        """Accepts an order about an adapter; a later `step` returns its answer."""
        self._woken = True
        self.adapters.handle(message)
        if isinstance(message, Unload) and message.force:
            self._evacuate(message.digest, waiting=True)

    def limit_host(self, nbytes: int | None) -> None:
        """Limits the adapters in host memory, in bytes; None lifts the limit."""
        self._woken = True
        self.adapters.limit_host(nbytes)

    def look(self, op: int) -> BatchView:
        """The batch as it is now, as the answer to the question `op`."""
        return self._reporter.view(op, self._requests.values(), self._steps)

    # the step

    def step(self) -> list[StepReport | Reply]:
        """Advances everything by one forward pass; returns the messages for the front.

        The `StepReport`, if any, comes first: it carries the table of adapters, which must have
        arrived before the answers to orders do.
        """
        begun = self._clock()
        self._woken = False
        self._expire(begun)
        replies = self._settle(begun)
        read = self._passes.run(begun)
        self._steps += bool(read.rows)
        self._answers.take_turns(read, begun)
        self._answers.take_masks(read, begun)
        self._note_costs(read)
        if begun - self._checked_at >= CHECK_SECONDS:
            self._checked_at = begun
            self.check_books()
        outputs, requests = self._answers.take(), self._requests.values()
        done = self._reporter.report(read.rows, outputs, requests, self._steps, read.begun)
        return [*replies] if done is None else [done, *replies]

    def take_refusals(self) -> StepReport | None:
        """The outputs of requests that were refused since the last step, to be sent before it."""
        outputs, requests = self._answers.take(), self._requests.values()
        if not outputs:
            return None
        return self._reporter.report((), outputs, requests, self._steps, self._clock())

    @property
    def idle(self) -> bool:
        """Whether no request is unfinished, no pass unread and no order unanswered."""
        busy = self._requests or self._answers or self._passes.in_flight
        return not busy and self.adapters.is_idle

    @property
    def broken(self) -> bool:
        """Whether the runner has failed `MAX_FAULTS` times in a row."""
        return self._tally.faults >= MAX_FAULTS

    def wait_seconds(self) -> float | None:
        """Seconds until `step` has work again if nothing arrives; None if never."""
        if self._woken or not self._scheduler.is_idle or self._passes.in_flight:
            return 0.0
        ends = [self._deadlines.next, self.adapters.deadline]
        end = min((end for end in ends if end is not None), default=None)
        return None if end is None else max(0.0, end - self._clock())

    def check_books(self) -> None:
        """Verifies, at any moment, that nothing was lost; see `books`. Raises `AssertionError`."""
        check_books(self._requests.values(), self._scheduler, self.adapters)

    def check(self) -> None:
        """Verifies that an idle engine holds nothing. Raises `AssertionError`."""
        self.check_books()
        assert self.idle, "the engine is not idle"
        assert self._pool.used == 0, "a KV block was leaked"
        assert self._scheduler.is_idle, "a request was left in the queue or running"
        self.adapters.check()

    def _expire(self, now: float) -> None:
        for request_id in self._deadlines.passed(now):
            self._end(self._requests[request_id], EXPIRED)
        for digest, waiting in self.adapters.overdue_unloads(now):
            self._evacuate(digest, waiting)
        if now - self._looked_at >= LATE_SECONDS:
            self._looked_at = now
            for request in self._forecast.late(now):
                if request.arrived < self._scheduler.passed_at:
                    self._end(request, LATE)

    def _evacuate(self, digest: str, waiting: bool) -> None:
        """Ends the requests that use an adapter, and with `waiting` those that wait for it."""
        for request in list(self._requests.values()):
            named = any(ref.digest == digest for ref in request.submit.adapters)
            if named and (request.pins or waiting):
                self._end(request, UNLOADED)

    def _settle(self, now: float) -> list[Reply]:
        """Lets the adapters' side move on: queues granted requests and ends refused ones."""
        settled = self.adapters.settle()
        self._woken |= settled.more
        for request in settled.granted:
            if request.queue_seconds is None:
                request.load_seconds = now - request.arrived if request.awaits_load else 0.0
                self._enqueue(request, now)
            else:
                self._scheduler.enqueue(request)
        for digest in settled.blocking:
            self._set_back(digest, now)
        for request, failure in settled.refused:
            self._forget(request)
            self._answers.fail(request.id, failure)
        return settled.replies

    def _set_back(self, digest: str, now: float) -> None:
        """Lets requests wait for their adapter again, so that another adapter gets its place.

        Their tokens stay, and are recomputed when it is back. Those that have just started run for
        a quarter of a turn first, so that each start is worth its cost.
        """
        for request in self._scheduler.running.copy():
            is_over = now - request.begun >= self._limits.adapter_turn / 4
            if is_over and any(pin.digest == digest for pin in request.pins):
                self._scheduler.remove(request)
                self.adapters.release(request)
                request.set_back()
                self._tally.set_back += 1
                self.adapters.want(request)
        self._woken = True

    def _note_costs(self, read: ReadPass) -> None:
        """Notes the duration of a pass, with its part of choosing tokens."""
        seconds = self._clock() - read.begun
        decodes = sum(row.count == 1 for row in read.rows)
        prompt_tokens = sum(row.count for row in read.rows) - decodes
        if read.rows:
            self._scheduler.costs.note(decodes, prompt_tokens, seconds)
            is_busy = len(self._scheduler.queue) > 0
            self._rates.note(decodes, prompt_tokens, seconds, is_busy)
            self._scheduler.queue.note(seconds)

    def _fault(self, requests: Sequence[Request], text: str, error: Exception) -> None:
        """Ends the requests that a failure has hit; `text` is for the log."""
        extra = {
            "request_ids": [request.submit.request_id for request in requests],
            "principals": sorted({request.submit.principal for request in requests} - {""}),
        }
        log.error(text, len(requests), exc_info=error, extra=extra)
        self._tally.faults += 1
        for request in requests:
            self._end(request, FAULT)

    def _finish(self, request: Request, failure: Failure | None) -> None:
        """Ends a request whose last token was chosen, or whose logits are not finite."""
        if failure is None and request.generates and request.pool is None:
            self._rates.note_answer(request.generated + 1, request.submit.max_new_tokens)
        self._end(request, failure)

    def _end(self, request: Request, failure: Failure | None = None) -> None:
        """Ends a request and releases everything it holds, whatever its state."""
        if failure is NOT_FINITE:
            self._scheduler.prefixes.poison(request)
        self._scheduler.remove(request)
        self.adapters.release(request)
        self._forget(request)
        self._woken = True
        if failure is not None:
            self._answers.fail(request.id, failure)

    def _forget(self, request: Request) -> None:
        request.state = RequestState.DONE
        del self._requests[request.id]
        self._deadlines.remove(request.id)
