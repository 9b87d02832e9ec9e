"""One pass ahead: a pass is launched before the result of the one before it is read.

While the host reads and answers pass N, the device computes pass N + 1, so the device does not wait
for the host. Pass N + 1 is scheduled as if N had been answered: the tokens that N chooses are only
on the device, and negative numbers stand for them in the requests.

    step n      launch N      read N-1, answer
    step n+1    launch N+1    read N, answer            device:  | N-1 | N | N+1 | ...

    request.tokens    prompt ... t t t -1-k             k: draw of the launch that is not read yet

A request may end by a stop token in N, by an abort or by its deadline when its row of N + 1 is
launched already. The result of that row is dropped, which wastes one row
of one pass. The number of tokens is known in advance, so an end by length wastes nothing. Requests
whose next token is chosen on the host (biased logits, log-probabilities of new tokens, structured
output, no end yet) take part in every other pass.

Memory. The launches run in order, on one stream:

    KV blocks    of a request that ended or was preempted are free at once. A launch under way may
                 still write to them, but every later launch overwrites what it will read.
    pins         are released at once too. Before the weights of a slot are removed or replaced,
                 `settle_slot` waits for the launch that reads them, even if no pin is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.faults import reach

from loraplex_server.engine.batching.request import Request, RequestState
from loraplex_server.engine.batching.scheduler import BatchRow, Logits, Scheduler
from loraplex_server.engine.passes.answers import Answers, OnFault, ReadPass
from loraplex_server.engine.passes.lock_step import FAILED
from loraplex_server.engine.passes.start import note_memory, start
from loraplex_server.engine.passes.tally import PassTally
from loraplex_server.engine.runner.protocol import (
    NOTHING_PENDING,
    AheadRunner,
    DrawOrder,
    StepResult,
    StepTicket,
)

NOWHERE = -1
"""In place of the number of a draw or of a line that a row does not have."""


@dataclass(frozen=True, slots=True)
class LaunchedRow:
    """A row of a launch, and the places of its results.

    Attributes:
        completes: its request's next token is chosen from its last logits, or its vector is whole.
        draw: number of the draw that chooses it; `NOWHERE` if the host does, or nobody.
        line: the first of its lines among those for the host; `NOWHERE` if it has none.
        state: the first of its states; `NOWHERE` if it has none.
    """

    row: BatchRow
    completes: bool
    draw: int
    line: int
    state: int = NOWHERE


class Flight:
    """A launch that has not been answered."""

    def __init__(
        self, rows: Sequence[LaunchedRow], batch: ForwardBatch, ticket: StepTicket, begun: float
    ) -> None:
        self.rows = rows
        self.begun = begun
        self._slots = batch.mix_slots
        self._ticket: StepTicket | None = ticket
        self._result: StepResult | None = None
        self._error: Exception | None = None

    def reads(self, slot: int) -> bool:
        """Whether the launch may still read the weights of `slot`."""
        return self._ticket is not None and bool((self._slots == slot).any())

    def land(self) -> None:
        """Waits until the device has computed the launch, or has failed to. Raises `DeviceLost`."""
        if self._ticket is not None:
            try:
                self._result = self._ticket.wait()
            except Exception as error:
                self._error = error
            self._ticket = None

    def result(self) -> StepResult:
        """The result, once landed. Raises what the launch has failed with."""
        if self._error is not None:
            raise self._error
        assert self._result is not None, "a launch is read before it has landed"
        return self._result


class OneAhead:
    """`Passes` over a runner that launches them; keeps one launch in flight between two steps."""

    def __init__(
        self,
        runner: AheadRunner,
        scheduler: Scheduler,
        answers: Answers,
        tally: PassTally,
        on_fault: OnFault,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._answers = answers
        self._tally = tally
        self._on_fault = on_fault
        self._clock = clock
        self._flight: Flight | None = None
        self._answered = clock()

    @property
    def in_flight(self) -> bool:
        """Whether a launch has not been answered yet."""
        return self._flight is not None

    def run(self, now: float) -> ReadPass:
        """Launches the next pass, then reads and answers the one that was launched before it.

        The duration of a pass is the time from the answer to the one before it, or from its launch
        if nothing was in flight then, to its own answer. So durations do not overlap.
        """
        before, self._flight = self._flight, None
        started = start(
            self._scheduler, self._tally, now, lambda rows, batch: self._launch(rows, batch, now)
        )
        self._flight = started.result
        rows: list[BatchRow] = []
        begun = now
        if before is not None:
            self._answer(before)
            rows = [launched.row for launched in before.rows]
            begun = max(before.begun, self._answered)
            self._answered = self._clock()
        self._answers.refill_masks()
        if started.error is not None:
            # Only now, since its requests may have ended well by the tokens just read.
            self._fail([row.request for row in started.rows], started.error)
        return ReadPass(rows, begun, started.rows)

    def settle_slot(self, slot: int) -> None:
        """Returns when no launch reads the weights of `slot` any more."""
        if self._flight is not None and self._flight.reads(slot):
            self._flight.land()

    # launching

    def _launch(self, rows: list[BatchRow], batch: ForwardBatch, now: float) -> Flight:
        launched: list[LaunchedRow] = []
        draws: list[DrawOrder] = []
        draw_lines: list[int] = []
        host_lines: list[int] = []
        at = states = 0
        for row in rows:
            if row.request.pool is not None:
                launched.append(LaunchedRow(row, row.completes, NOWHERE, NOWHERE, states))
                states += row.states
                continue
            end = at + (row.count if row.logits is Logits.ALL else row.logits is Logits.LAST)
            draw, line, completes = NOWHERE, NOWHERE, row.completes
            is_for_host = completes and _is_chosen_on_host(row.request)
            if row.logits is Logits.ALL or is_for_host:
                line = len(host_lines)
                host_lines.extend(range(at, end))
            if completes and not is_for_host:
                draw = len(draws)
                draws.append(_order(row.request))
                draw_lines.append(end - 1)
            launched.append(LaunchedRow(row, completes, draw, line))
            at = end
        ticket = self._runner.launch(
            batch, draws, np.array(draw_lines, np.int32), np.array(host_lines, np.int32)
        )
        for one in launched:
            _advance(one)
        return Flight(launched, batch, ticket, now)

    # reading

    def _answer(self, flight: Flight) -> None:
        """Waits for a launch and gives its requests their tokens and log-probabilities."""
        flight.land()
        try:
            result = flight.result()
            reach("engine.after_read")
        except Exception as error:
            rows = [launched.row for launched in flight.rows]
            note_memory(self._scheduler, self._tally, rows, error)
            self._fail([row.request for row in rows], error)
            return
        tokens: list[int] = result.tokens.tolist()
        due: list[Request] = []
        lines: list[int] = []
        for launched in flight.rows:
            request = launched.row.request
            if request.state is RequestState.DONE:
                self._tally.wasted_rows += 1
                continue
            self._tally.faults = 0  # a pass that served nobody proves nothing
            row = launched.row
            self._scheduler.settle(row)
            if launched.completes:
                request.awaits_token = False
            if request.pool is not None:
                self._answers.pool(row, result.states[launched.state :][: row.states])
                continue
            last = launched.line
            if row.logits is Logits.ALL:
                last += row.count - 1
                if not self._answers.score(row, result.lines[launched.line : last + 1]):
                    continue
            if launched.draw != NOWHERE:
                self._answers.give(request, tokens[launched.draw], [])
            elif launched.completes and self._answers.can_sample(request):
                due.append(request)
                lines.append(last)
            elif launched.completes and request.state is RequestState.RUNNING:
                self._answers.wait(request, result.lines[last])
            # A row that waits and was preempted meanwhile is computed again before it is chosen.
        if due:
            self._answers.sample(due, result.lines, lines)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Ends those requests of a failed pass that have not ended meanwhile."""
        alive = [request for request in requests if request.state is not RequestState.DONE]
        self._on_fault(alive, FAILED, error)


def _is_chosen_on_host(request: Request) -> bool:
    """Whether the host needs the logits from which the request's next token is chosen."""
    if request.constraint is not None:  # the mask depends on the token before
        return True
    return request.submit.logprobs is not None or request.draw.is_biased(request.pending)


def _order(request: Request) -> DrawOrder:
    """How the device chooses the request's next token."""
    draw, params = request.draw, request.draw.params
    counted, counts = draw.counted
    return DrawOrder(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        uniform=draw.uniform(ahead=request.pending),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seen=draw.seen,
        counted=counted,
        counts=counts,
        pending=-1 - request.tokens[-1] if request.pending else NOTHING_PENDING,
    )


def _advance(launched: LaunchedRow) -> None:
    """Notes what the launch of a row will have done once it has run."""
    request = launched.row.request
    request.computed += launched.row.count
    if launched.draw != NOWHERE:
        request.draw.is_costly = False  # to the host
    if launched.completes:
        if launched.draw != NOWHERE and not request.next_is_last:
            request.expect(launched.draw)
        else:
            request.awaits_token = True
