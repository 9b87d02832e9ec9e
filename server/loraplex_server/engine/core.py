"""The engine: requests in, one step at a time, outputs out.

A plain object without threads, sockets or files of its own. One thread owns it; adapter files are
read by the loader it is given. Every accepted request has exactly one last output, unless it was
aborted, and whatever that is, it releases blocks, pins and queue place in `_end`.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason

from loraplex_server.engine.adapters.auto_merge import AutoMerge, MergePolicy
from loraplex_server.engine.adapters.host_tier import HostTier
from loraplex_server.engine.adapters.loader import Desk, Loader, ReadResult, ThreadLoader
from loraplex_server.engine.adapters.merging import Merging
from loraplex_server.engine.adapters.residency import UNLOADED, Residency
from loraplex_server.engine.adapters.slots import AdapterSlots
from loraplex_server.engine.batching.admission import refusal
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
from loraplex_server.engine.batching.scheduler import Limits, Logits, Row, Scheduler
from loraplex_server.engine.messages import (
    Control,
    ControlDone,
    Failure,
    LoadDone,
    Logprobs,
    Merge,
    MergeDone,
    Output,
    StepDone,
    Submit,
    Unload,
    Unmerge,
)
from loraplex_server.engine.reporting import Reporter
from loraplex_server.engine.runner.protocol import ModelRunner

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""So many failed passes in a row, and the process is not worth keeping."""

EXPIRED = Failure(Reason.DEADLINE_EXCEEDED, "the deadline passed before the request was finished")
FAULT = Failure(Reason.ENGINE_FAULT, "the model failed to compute this request")
NOT_FINITE = Failure(Reason.NON_FINITE_LOGITS, "the model's output for this request is not finite")


class EngineCore:
    """Everything the engine decides, over a runner that computes.

    Attributes:
        broken: the runner has failed `MAX_FAULTS` times in a row; the process should be replaced.
    """

    def __init__(
        self,
        runner: ModelRunner,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        loader: Loader | None = None,
        merge_policy: MergePolicy | None = None,
    ) -> None:
        """`clock` gives the seconds that deadlines are in; `loader` defaults to threads.

        With a `merge_policy` the engine merges adapters by itself where that pays.
        """
        self._runner = runner
        self._limits = limits or Limits()
        self._clock = clock
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(self._pool, self._limits)
        self._desk = Desk(loader or ThreadLoader(runner))
        self._slots = AdapterSlots(runner, clock)
        self._host = HostTier(runner.host_budget_bytes, runner.info.device.startswith("cpu"))
        automatic = AutoMerge(merge_policy) if merge_policy is not None else None
        self._merging = Merging(runner, self._slots, self._host, self._desk, clock, automatic)
        self._residency = Residency(
            runner, self._slots, self._host, self._desk, self._merging, clock
        )
        self._reporter = Reporter(
            self._scheduler, self._residency, self._host, self._merging, clock
        )
        self._requests: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._outputs: list[Output] = []
        self._arrivals = 0
        self._steps = 0
        self._faults = 0
        self._stirred = False
        self.broken = False

    # commands

    def add(self, submit: Submit) -> None:
        """Takes a request, or answers in the next step why not."""
        if submit.id in self._requests:
            log.error("request id %d is in use; the second one is dropped", submit.id)
            return
        self._stirred = True
        waiting = [r for r in self._requests.values() if r.queue_seconds is None]
        failure = refusal(
            submit,
            self._runner.info,
            self._pool.num_blocks * self._pool.block_size,
            self._limits,
            len(waiting),
            sum(r.prompt_len for r in waiting),
        )
        if failure is not None:
            self._outputs.append(Output(id=submit.id, error=failure))
            return
        self._arrivals += 1
        draw = Draw(submit.sampling, submit.token_ids)
        request = Request(submit, self._arrivals, self._clock(), draw)
        self._requests[submit.id] = request
        if submit.deadline is not None:
            heapq.heappush(self._deadlines, (submit.deadline, submit.id))
        if submit.adapters:
            self._residency.want(request)
        else:
            self._scheduler.enqueue(request)

    def abort(self, request_id: int) -> None:
        """Drops a request at once and without an output. Unknown ids are ignored."""
        self._outputs = [output for output in self._outputs if output.id != request_id]
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def control(self, message: Control) -> None:
        """Takes an order about an adapter; answered among `replies`."""
        self._stirred = True
        match message:
            case Unload():
                self._residency.unload(message)
                if message.force:
                    self._evacuate(message.digest, waiting=True)
            case Unmerge():
                self._merging.unmerge(message)
            case Merge():
                self._merging.order(message)
                self._residency.order(message)
            case _:
                self._residency.order(message)

    def replies(self) -> list[ControlDone | LoadDone | MergeDone]:
        """Takes out what control orders, loads and merges have come to since the last call."""
        loads, self._residency.replies = self._residency.replies, []
        merges, self._merging.replies = self._merging.replies, []
        return [*loads, *merges]

    # the step

    def step(self) -> StepDone | None:
        """Moves everything on by one forward pass; None if nothing came of it."""
        self._stirred = False
        begun = self._clock()
        self._expire(begun)
        self._settle()
        rows = self._scheduler.schedule(begun)
        if rows:
            self._steps += 1
            logits = self._compute(rows)
            if logits is not None:
                self._commit(rows, logits)
        outputs, self._outputs = self._outputs, []
        return self._reporter.report(rows, outputs, self._requests.values(), self._steps, begun)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        waits = self._requests or self._outputs
        return not waits and self._residency.is_idle and self._merging.is_idle

    def wait_seconds(self) -> float | None:
        """How long `step` has nothing to do, if no command comes and no read ends; None: ever."""
        if self._stirred or self._outputs or self._scheduler.running or self._scheduler.queue:
            return 0.0
        if self._residency.has_more or self._merging.has_more:
            return 0.0
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        ends = [self._deadlines[0][0]] if self._deadlines else []
        if self._residency.unloads.deadline is not None:
            ends.append(self._residency.unloads.deadline)
        return max(0.0, min(ends) - self._clock()) if ends else None

    def check(self) -> None:
        """Verifies that an idle engine holds nothing. Raises `AssertionError`."""
        self._pool.check()
        assert self.idle, "somebody still waits"
        assert self._pool.used == 0, "a KV block was leaked"
        assert not self._scheduler.queue, "a request was left in the queue"
        assert not self._scheduler.running, "a request was left running"
        self._residency.check()
        self._merging.check()

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None and request.submit.deadline == deadline:
                self._end(request, EXPIRED)
        for digest in self._residency.unloads.overdue(now):
            # Who waits for it now waits for its next load, unless this one is not even done.
            waiting = digest not in self._slots.residents
            if waiting:
                self._residency.refuse_orders(digest)
            self._evacuate(digest, waiting)

    def _evacuate(self, digest: str, waiting: bool) -> None:
        """Ends the requests that use an adapter, and those that wait for it if `waiting`."""
        for request in list(self._requests.values()):
            named = any(ref.digest == digest for ref in request.submit.adapters)
            if named and (request.pins or waiting):
                self._end(request, UNLOADED)

    def _settle(self) -> None:
        """Takes in what the loader has done; puts at most one thing of it on the device."""
        for result in self._desk.finished():
            if isinstance(result, ReadResult):
                self._residency.take(result)
            else:
                self._merging.take(result)
        settled = self._residency.settle()
        for request in settled.granted:
            self._scheduler.enqueue(request)
        for request, failure in settled.refused:
            request.state = RequestState.DONE
            del self._requests[request.id]
            self._outputs.append(Output(id=request.id, error=failure))
        self._merging.begin()
        if not self._residency.published:
            self._merging.publish()

    def _compute(self, rows: Sequence[Row]) -> Floats | None:
        """The pass. A failed one costs the requests that were in it, and no others."""
        batch = lay_out(rows)
        begun = self._clock()
        try:
            reach("engine.before_step")
            logits: Floats = np.asarray(self._runner.forward(batch))
        except Exception:
            self._fault(rows, "a forward pass failed; its %d requests fail")
            return None
        self._faults = 0
        self._watch(rows, self._clock() - begun)
        return logits

    def _fault(self, rows: Sequence[Row], text: str) -> None:
        log.exception(text, len(rows))
        self._faults += 1
        self.broken = self._faults >= MAX_FAULTS
        for row in rows:
            self._end(row.request, FAULT)

    def _watch(self, rows: Sequence[Row], seconds: float) -> None:
        """Shows the pass to the automatic mode of merging, if there is one."""
        if not self._merging.is_automatic:
            return
        alone = Counter(
            row.request.pins[0].digest
            for row in rows
            if len(row.request.mix) == 1 and row.request.mix[0][1] == 1.0
        )
        tokens = sum(row.count for row in rows)
        quiet = self._desk.is_quiet and not self._residency.published
        self._merging.observe(alone, len(rows), tokens, seconds, quiet)

    def _commit(self, rows: Sequence[Row], logits: Floats) -> None:
        """Books what was computed, and gives each row that is due its next token."""
        due: list[Row] = []
        lines: list[int] = []
        at = 0
        for row in rows:
            row.request.computed += row.count
            if row.logits is Logits.ALL and not self._score(row, logits[at : at + row.count]):
                self._end(row.request, NOT_FINITE)
            elif row.completes:
                due.append(row)
                lines.append(at + (row.count - 1 if row.logits is Logits.ALL else 0))
            at += row.count if row.logits is Logits.ALL else row.logits is Logits.LAST
        if not due:
            return
        picked = logits if len(lines) == len(logits) else logits[lines]
        try:
            tokens = sample(picked, [row.request.draw for row in due])
            reach("engine.after_sample")
        except Exception:
            self._fault(due, "sampling failed; its %d requests fail")
            return
        for row, line, token in zip(due, picked, tokens, strict=True):
            self._give(row.request, token, line)

    def _score(self, row: Row, logits: Floats) -> bool:
        """Takes the log-probabilities of prompt tokens; False if the logits are not finite."""
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
        """Turns a chosen token into the request's output of this step."""
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
        """The one way out: releases all that the request holds."""
        if request.state is RequestState.FETCHING:
            self._residency.forget(request)
        else:
            self._scheduler.remove(request)
            self._residency.release(request)
        request.state = RequestState.DONE
        del self._requests[request.id]
        self._stirred = True
        if failure is not None:
            self._outputs.append(Output(id=request.id, error=failure))
