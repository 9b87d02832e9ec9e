"""The engine core: requests in, one step at a time, messages out.

A plain object without threads, sockets or files of its own. One thread owns it; adapter files are
read by the loader that it is given. Every accepted request that is not aborted has exactly one last
output. However a request ends, `_end` releases its blocks, its pins and its place in a queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.adapters import Adapters
from loraplex_server.engine.adapters.attempts import Announcements
from loraplex_server.engine.adapters.loader import Loader, ThreadLoader
from loraplex_server.engine.adapters.residency import UNLOADED
from loraplex_server.engine.batching.admission import refusal
from loraplex_server.engine.batching.deadlines import Deadlines
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.layout import lay_out
from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.sampler import (
    NON_FINITE,
    Draw,
    Floats,
    finite_rows,
    logprobs,
    sample,
)
from loraplex_server.engine.batching.scheduler import (
    PRIORITY_SECONDS,
    BatchRow,
    EngineLimits,
    Logits,
    Scheduler,
)
from loraplex_server.engine.books import check_books
from loraplex_server.engine.messages import (
    Control,
    Failure,
    Logprobs,
    Output,
    Reply,
    StepReport,
    Submit,
    Unload,
)
from loraplex_server.engine.reporting import Reporter
from loraplex_server.engine.runner.protocol import ModelRunner

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""Number of failed forward passes in a row after which the process should be replaced."""

CHECK_SECONDS = 60.0
"""Seconds after which a busy engine verifies its books; an idle one does so whenever it rests."""

EXPIRED = Failure(Reason.DEADLINE_EXCEEDED, "the deadline passed before the request was finished")
FAULT = Failure(Reason.ENGINE_FAULT, "the model failed to compute this request")
NOT_FINITE = Failure(Reason.NON_FINITE_LOGITS, "the model's output for this request is not finite")


class EngineCore:
    """All decisions of the engine, over a runner that computes.

    Attributes:
        adapters: the adapters' side of the engine.
        broken: the runner has failed `MAX_FAULTS` times in a row.
    """

    def __init__(
        self,
        runner: ModelRunner,
        limits: EngineLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        loader: Loader | None = None,
        attempts: Announcements | None = None,
    ) -> None:
        """`clock` gives the seconds in which deadlines are; `loader` defaults to threads.

        `attempts` announces work on adapters that the process may not survive.
        """
        self._runner = runner
        self._limits = limits or EngineLimits()
        self._clock = clock
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(self._pool, self._limits)
        self.adapters = Adapters(runner, loader or ThreadLoader(runner), clock, attempts)
        self._reporter = Reporter(self._scheduler, self.adapters, clock)
        self._requests: dict[int, Request] = {}
        self._deadlines = Deadlines()
        self._outputs: list[Output] = []
        self._arrivals = 0
        self._steps = 0
        self._faults = 0
        self._woken = False
        self._checked_at = clock()
        self.broken = False

    # commands

    def add(self, submit: Submit) -> None:
        """Accepts a request, or refuses it in the output of the next step."""
        if submit.id in self._requests:
            log.error("request id %d is in use; the second one is dropped", submit.id)
            return
        self._woken = True
        cache_tokens = self._pool.num_blocks * self._pool.block_size
        waiting = [r.prompt_len for r in self._requests.values() if r.queue_seconds is None]
        failure = refusal(submit, waiting, self._runner.info, cache_tokens, self._limits)
        if failure is not None:
            self._outputs.append(Output(id=submit.id, error=failure))
            return
        self._arrivals += 1
        now, draw = self._clock(), Draw(submit.sampling, submit.token_ids)
        order = (now - submit.priority * PRIORITY_SECONDS, self._arrivals)
        request = Request(submit, order, now, draw)
        self._requests[submit.id] = request
        if submit.deadline is not None:
            self._deadlines.add(submit.id, submit.deadline)
        if submit.adapters:
            self.adapters.want(request)
        else:
            self._scheduler.enqueue(request)

    def reject(self, request_id: int) -> None:
        """Fails a request whose `add` raised an exception, however far it came."""
        self._woken = True
        request = self._requests.get(request_id)
        if request is not None:
            try:
                self._end(request)
            except Exception:
                log.exception("a failed request could not be ended")
                self._requests.pop(request_id, None)
        self._outputs.append(Output(id=request_id, error=FAULT))

    def abort(self, request_id: int) -> None:
        """Ends a request at once and without an output. Unknown ids are ignored."""
        self._outputs = [output for output in self._outputs if output.id != request_id]
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def control(self, message: Control) -> None:
        """Accepts an order about an adapter; a later `step` returns its answer."""
        self._woken = True
        self.adapters.handle(message)
        if isinstance(message, Unload) and message.force:
            self._evacuate(message.digest, waiting=True)

    # the step

    def step(self) -> list[StepReport | Reply]:
        """Advances everything by one forward pass; returns the messages for the front.

        The `StepReport`, if any, comes first: it carries the table of adapters, which must have
        arrived before the answers to orders do.
        """
        begun = self._clock()
        self._woken = False
        self._expire(begun)
        replies = self._settle()
        rows = self._scheduler.schedule(begun)
        if rows:
            self._steps += 1
            logits = self._compute(rows)
            if logits is not None:
                self._commit(rows, logits)
        self._take_turns(rows, begun)
        if begun - self._checked_at >= CHECK_SECONDS:
            self._checked_at = begun
            self.check_books()
        outputs, self._outputs = self._outputs, []
        done = self._reporter.report(rows, outputs, self._requests.values(), self._steps, begun)
        return [*replies] if done is None else [done, *replies]

    @property
    def idle(self) -> bool:
        """Whether no request is unfinished and no order unanswered."""
        return not self._requests and not self._outputs and self.adapters.is_idle

    def wait_seconds(self) -> float | None:
        """Seconds until `step` has work again if nothing arrives; None if never."""
        if self._woken or not self._scheduler.is_idle:
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

    def _evacuate(self, digest: str, waiting: bool) -> None:
        """Ends the requests that use an adapter, and with `waiting` those that wait for it."""
        for request in list(self._requests.values()):
            named = any(ref.digest == digest for ref in request.submit.adapters)
            if named and (request.pins or waiting):
                self._end(request, UNLOADED)

    def _settle(self) -> list[Reply]:
        """Lets the adapters' side move on: queues granted requests and ends refused ones."""
        settled = self.adapters.settle()
        self._woken |= settled.more
        for request in settled.granted:
            self._scheduler.enqueue(request)
        for request, failure in settled.refused:
            self._forget(request)
            self._outputs.append(Output(id=request.id, error=failure))
        return settled.replies

    def _compute(self, rows: Sequence[BatchRow]) -> Floats | None:
        """Logits of the forward pass. If it fails, its requests end; returns None."""
        batch = lay_out(rows)
        try:
            reach("engine.before_step")
            logits: Floats = np.asarray(self._runner.forward(batch))
        except Exception:
            requests = [row.request for row in rows]
            self._fault(requests, "a forward pass failed; its %d requests fail")
            return None
        self._faults = 0
        return logits

    def _fault(self, requests: Sequence[Request], text: str) -> None:
        log.exception(text, len(requests))
        self._faults += 1
        self.broken = self._faults >= MAX_FAULTS
        for request in requests:
            self._end(request, FAULT)

    def _commit(self, rows: Sequence[BatchRow], logits: Floats) -> None:
        """Notes the computed tokens, and samples the next token of each completed row.

        Rows for which sampling is costly wait for their turn instead.
        """
        due: list[Request] = []
        lines: list[int] = []
        at = 0
        for row in rows:
            row.request.computed += row.count
            if row.logits is Logits.ALL and not self._score(row, logits[at : at + row.count]):
                self._end(row.request, NOT_FINITE)
            elif row.completes:
                line = at + (row.count - 1 if row.logits is Logits.ALL else 0)
                if row.request.draw.is_costly:
                    self._scheduler.turns.wait(row.request, logits[line])
                else:
                    due.append(row.request)
                    lines.append(line)
            at += row.count if row.logits is Logits.ALL else row.logits is Logits.LAST
        if due:
            self._sample(due, logits if len(lines) == len(logits) else logits[lines])

    def _sample(self, due: Sequence[Request], logits: Floats) -> None:
        """Gives each request its next token, chosen from its row of `logits`."""
        try:
            tokens = sample(logits, [request.draw for request in due])
            reach("engine.after_sample")
        except Exception:
            self._fault(due, "sampling failed; its %d requests fail")
            return
        for request, line, token in zip(due, logits, tokens, strict=True):
            self._give(request, token, line)

    def _take_turns(self, rows: Sequence[BatchRow], begun: float) -> None:
        """Samples requests for which that is costly, for as long as the other rows allow."""
        turns = self._scheduler.turns
        if not turns:
            return
        at = self._clock()
        turns.earn(at - begun)
        is_shared = any(not row.request.draw.is_costly for row in rows)
        while turns and not (is_shared and turns.is_over):
            request, logits = turns.take()
            self._sample([request], logits[np.newaxis])
            began, at = at, self._clock()
            turns.spend(at - began)

    def _score(self, row: BatchRow, logits: Floats) -> bool:
        """Takes log-probabilities of prompt tokens; False if the logits are not finite."""
        request = row.request
        skipped = request.scored - 1 - row.start
        wanted = logits[skipped : request.prompt_len - 1 - row.start]
        if not all(finite_rows(wanted)):
            return False
        for line in wanted:
            token = request.tokens[request.scored]
            count = request.submit.prompt_logprobs or 0
            request.prompt_logprobs.append(logprobs(line, token, count))
            request.scored += 1
        return True

    def _give(self, request: Request, token: int, logits: Floats) -> None:
        """Adds a sampled token to a request and to the outputs of this step."""
        if token == NON_FINITE:
            self._end(request, NOT_FINITE)
            return
        started = request.generated == 0
        finish: str | None = None
        if token in request.stops:
            finish = "stop"
        elif request.generated + 1 == request.submit.max_new_tokens:
            finish = "length"
        entries: list[Logprobs] = []
        if request.submit.logprobs is not None and finish != "stop":
            entries.append(logprobs(logits, token, request.submit.logprobs))
        output = Output(
            id=request.id,
            token_ids=[] if finish == "stop" else [token],
            logprobs=entries,
            prompt_logprobs=request.prompt_logprobs if started else [],
            started=started,
            queue_seconds=(request.queue_seconds or 0.0) if started else 0.0,
            finish=finish,
        )
        self._outputs.append(output)
        if finish is None:
            request.append(token)
        else:
            self._end(request)

    def _end(self, request: Request, failure: Failure | None = None) -> None:
        """Ends a request and releases everything it holds, whatever its state."""
        self._scheduler.remove(request)
        self.adapters.release(request)
        self._forget(request)
        self._woken = True
        if failure is not None:
            self._outputs.append(Output(id=request.id, error=failure))

    def _forget(self, request: Request) -> None:
        request.state = RequestState.DONE
        del self._requests[request.id]
        self._deadlines.remove(request.id)
