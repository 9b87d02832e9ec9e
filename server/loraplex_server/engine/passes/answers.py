"""The outputs of a step, and how the results of a pass become outputs.

Requests get their next tokens and the log-probabilities that they ask for. Requests that end
are handed back to the core, which releases what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason

from loraplex_server.engine.batching.prefix_cache import vouch
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.sampler import NON_FINITE, Floats
from loraplex_server.engine.batching.scheduler import BatchRow, Logits
from loraplex_server.engine.batching.turns import Turns
from loraplex_server.engine.messages import Failure, Logprobs, Output
from loraplex_server.engine.passes.choices import Choices
from loraplex_server.engine.passes.masks import Masks
from loraplex_server.engine.passes.pooling import Pool

NOT_FINITE = Failure(Reason.NON_FINITE_LOGITS, "the model's output for this request is not finite")


OnFault = Callable[[Sequence[Request], str, Exception], None]
"""Ends requests after a failure. The text, for the log, has a placeholder for their number."""


@dataclass(frozen=True, slots=True)
class ReadPass:
    """What a step has done.

    Attributes:
        rows: those of the pass that was read; empty if none was.
        begun: time on the engine's clock from which the duration of that pass counts.
        ahead: rows of the pass that was started and is not read yet.
    """

    rows: Sequence[BatchRow]
    begun: float
    ahead: Sequence[BatchRow] = ()


class Answers:
    """The outputs that are not sent yet, and the ways in which they are made."""

    def __init__(
        self,
        choices: Choices,
        masks: Masks,
        turns: Turns,
        clock: Callable[[], float],
        end: Callable[[Request, Failure | None], None],
        on_fault: OnFault,
    ) -> None:
        """`choices` chooses tokens, among those of `masks`; `end` ends a request.

        `on_fault` ends requests for which choosing a token has failed.
        """
        self._choices = choices
        self._masks = masks
        self._turns = turns
        self._clock = clock
        self._end = end
        self._on_fault = on_fault
        self._outputs: list[Output] = []

    def __bool__(self) -> bool:
        """Whether there are outputs to send."""
        return bool(self._outputs)

    def fail(self, request_id: int, failure: Failure) -> None:
        """Adds the last output of a request that fails."""
        self._outputs.append(Output(id=request_id, error=failure))

    def withdraw(self, request_id: int) -> None:
        """Drops the outputs of a request."""
        self._outputs = [output for output in self._outputs if output.id != request_id]

    def take(self) -> list[Output]:
        """Removes and returns all outputs."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def commit(self, rows: Sequence[BatchRow], logits: Floats, states: Floats) -> None:
        """Notes the computed tokens, and samples the next token of each completed row.

        Rows for which sampling is costly wait for their turn instead, and others for their mask.
        `states` are those of the rows that want some, in their order.
        """
        due: list[Request] = []
        lines: list[int] = []
        at = first_state = 0
        for row in rows:
            row.request.computed += row.count
            if row.request.pool is not None:
                self.pool(row, states[first_state : first_state + row.states])
                first_state += row.states
                continue
            is_all = row.logits is Logits.ALL
            is_sound = not is_all or self.score(row, logits[at : at + row.count])
            if is_sound and row.completes:
                line = at + (row.count - 1 if is_all else 0)
                if self.can_sample(row.request):
                    due.append(row.request)
                    lines.append(line)
                else:
                    self.wait(row.request, logits[line])
            at += row.count if is_all else row.logits is Logits.LAST
        if due:
            self.sample(due, logits, lines)

    def can_sample(self, request: Request) -> bool:
        """Whether the next token of a request can be chosen now, and in little time."""
        return self._masks.is_ready(request) and not self._choices.takes_long(request.draw)

    def wait(self, request: Request, logits: Floats) -> None:
        """Lets a running request wait for its mask or its turn with its `logits` [vocab]."""
        if self._masks.is_ready(request):
            self._turns.wait(request, logits)
        else:
            self._turns.hold(request, logits)

    def sample(self, due: Sequence[Request], logits: Floats, lines: Sequence[int]) -> None:
        """Gives each request its next token, chosen from its line of `logits`.

        Requests that cannot go on by their structure end instead.
        """
        if any(request.constraint is not None for request in due):
            due, lines = self._restricted(due, lines)
            if not due:
                return
        try:
            tokens = self._choices.choose(logits, lines, [request.draw for request in due])
            entries = self._entries(due, logits, lines, tokens)
            reach("engine.after_sample")
        except Exception as error:
            self._on_fault(due, "sampling failed; its %d requests fail", error)
            return
        for request, token, entry in zip(due, tokens, entries, strict=True):
            self.give(request, token, entry)

    def _restricted(
        self, due: Sequence[Request], lines: Sequence[int]
    ) -> tuple[list[Request], list[int]]:
        """Restricts the choices of requests to their masks, and ends those that have failed.

        Returns the others, with their lines.
        """
        alive: list[Request] = []
        kept: list[int] = []
        for request, line in zip(due, lines, strict=True):
            if (failure := self._masks.restrict(request)) is not None:
                self._end(request, failure)
            else:
                alive.append(request)
                kept.append(line)
        return alive, kept

    def _entries(
        self, due: Sequence[Request], logits: Floats, lines: Sequence[int], tokens: Sequence[int]
    ) -> list[list[Logprobs]]:
        """The log-probabilities that belong to each request's new token, at most one of them."""
        entries: list[list[Logprobs]] = [[] for _ in due]
        wanted = [
            (at, request.submit.logprobs)
            for at, (request, token) in enumerate(zip(due, tokens, strict=True))
            if request.submit.logprobs is not None
            and request.generates
            and token != NON_FINITE
            and token not in request.stops
        ]
        scored = self._choices.logprobs(
            logits,
            [lines[at] for at, _ in wanted],
            [tokens[at] for at, _ in wanted],
            [count for _, count in wanted],
        )
        for (at, _), entry in zip(wanted, scored, strict=True):
            entries[at].append(entry)
        return entries

    def take_turns(self, read: ReadPass, begun: float) -> None:
        """Samples requests for which that is costly, for as long as the other rows allow.

        The step began at `begun` on the engine's clock.
        """
        turns = self._turns
        if not turns:
            return
        at = self._clock()
        turns.earn(at - begun)
        is_shared = any(
            not self._choices.takes_long(row.request.draw) for row in (*read.rows, *read.ahead)
        )
        while turns and not (is_shared and turns.is_over):
            request, logits = turns.take()
            self.sample([request], logits[np.newaxis], [0])
            began, at = at, self._clock()
            turns.spend(at - began)

    def refill_masks(self) -> None:
        """Starts the computation of the masks that are out of date, beside a forward pass."""
        self._masks.refill()

    def take_masks(self, read: ReadPass, begun: float) -> None:
        """Samples held requests whose masks have become ready.

        The step began at `begun` on the engine's clock.
        """
        held = self._turns.held
        if not held:
            return
        rows = [row.request for row in (*read.rows, *read.ahead)]
        self._masks.await_some(held, rows, self._clock() - begun)
        due = [request for request in held if self._masks.is_ready(request)]
        for request in [each for each in due if not self.can_sample(each)]:
            due.remove(request)
            self.wait(request, held.pop(request))
        if due:
            logits = np.stack([held.pop(request) for request in due])
            self.sample(due, logits, range(len(due)))

    def score(self, row: BatchRow, logits: Floats) -> bool:
        """Takes log-probabilities of prompt tokens from `logits`, a line for each token of the row.

        If they are not finite, the request ends; returns False.
        """
        request = row.request
        skipped = request.scored - 1 - row.start
        wanted = logits[skipped : request.prompt_len - 1 - row.start]
        if not self._choices.all_finite(wanted):
            self._end(request, NOT_FINITE)
            return False
        lines = range(len(wanted))
        tokens = request.tokens[request.scored : request.scored + len(wanted)]
        counts = [request.submit.prompt_logprobs or 0] * len(wanted)
        request.prompt_logprobs += self._choices.logprobs(wanted, lines, tokens, counts)
        request.scored += len(wanted)
        vouch(request)
        return True

    def pool(self, row: BatchRow, states: Floats) -> None:
        """Adds final states, float32 [row.states, hidden], to the vector of the row's request.

        Ends the request if it is complete, or if a state is not finite.
        """
        request, pool = row.request, row.request.pool
        assert isinstance(pool, Pool), "a request that generates tokens has no vector"
        if not np.isfinite(states).all():
            self._end(request, NOT_FINITE)
            return
        if row.states:
            pool.add(row.start + row.count - row.states, states)
            vouch(request)
        if not row.completes:
            return
        self._outputs.append(
            Output(
                id=request.id,
                started=True,
                cached_tokens=request.cached,
                base_tokens=min(request.active_from, request.prompt_len),
                queue_seconds=request.queue_seconds or 0.0,
                load_seconds=request.load_seconds,
                finish="length",
                state=pool.vector().tobytes(),
            )
        )
        self._end(request, None)

    def give(self, request: Request, token: int, entries: list[Logprobs]) -> None:
        """Gives a request its next token, and adds it to the outputs.

        `entries` are the log-probabilities of the token, if the request wants them. The token of a
        request that wants none is dropped: it only shows that the prompt's logits are finite.
        """
        if token == NON_FINITE:
            self._end(request, NOT_FINITE)
            return
        vouch(request)
        generated = request.generated
        started = generated == 0
        finish: str | None = None
        is_stop = request.generates and token in request.stops
        is_complete, failure = False, None
        if request.constraint is not None and request.generates and not is_stop:
            is_complete, failure = self._masks.advance(request, token)
        if failure is not None:
            self._end(request, failure)
            return
        if not request.generates:
            finish = "length"
        elif is_stop or is_complete:
            finish = "stop"
        elif generated + 1 == request.submit.max_new_tokens:
            finish = "length"
        elif not started and request.submit.logprobs is None:
            self._outputs.append(Output(request.id, [token]))
            request.append(token)
            return
        output = Output(
            id=request.id,
            token_ids=[token] if request.generates and not is_stop else [],
            logprobs=entries,
            prompt_logprobs=request.prompt_logprobs if started else [],
            started=started,
            cached_tokens=request.cached if started else 0,
            base_tokens=min(request.active_from, request.prompt_len) if started else 0,
            queue_seconds=(request.queue_seconds or 0.0) if started else 0.0,
            load_seconds=request.load_seconds if started else 0.0,
            finish=finish,
            stop_token=token if is_stop else None,
        )
        self._outputs.append(output)
        if finish is None:
            request.append(token)
        else:
            self._end(request, None)
