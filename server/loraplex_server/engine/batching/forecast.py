"""When a request would start and end, by measured rates, and what is refused because of that.

    arrival -- waits: cost ahead / rate --> starts -- own prompt --> first token -- answer --> end

The cost ahead of a request is what its account has waiting before it, and what the other accounts
have waiting until their counters reach the one that its account will have then: see `FairQueue`.
That of a principal with several accounts is found in the same way twice: among them, and then among
principals.
The wait is at least what the account's own queue takes at the pace at which it has been served,
unless that is more than a few times what takes to compute all that waits.
The answer takes as many steps as it has tokens, with more rows than now if more requests start than
end: while a burst begins, steps are still much shorter.

Nothing is refused while no other request waits, or before rates are known. So an idle server never
refuses, however short a deadline is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_model.base.refusal import Reason

from loraplex_server.engine.batching.step_costs import NEW_COST
from loraplex_server.engine.messages import Failure

if TYPE_CHECKING:
    from loraplex_server.engine.batching.fair_queue import Account
    from loraplex_server.engine.batching.request import Request
    from loraplex_server.engine.batching.scheduler import Scheduler
    from loraplex_server.engine.batching.step_costs import WorkRates

MARGIN = 1.3
"""Time that a request must have for itself if it has to wait, over that which it takes at measured
rates. One that starts at once needs no more than that."""

WAIT_MARGIN = 2.2
"""The same for its wait, which depends on others and is known less well. A queue that is shorter
for that is not empty, so it costs no throughput."""

MOST_BACKLOGS = 2.0
"""The longest wait that a pace is believed to mean, in times that all that waits now takes. A pace
is measured over a few seconds, in which an account may have had bad luck."""

LATE_MARGIN = 1.05
"""The same when it has waited, for its answer in steps as short as now: few are accepted and then
not computed."""

LATE = Failure(
    Reason.DEADLINE_UNMEETABLE,
    "the request has waited for so long that it would not end before its deadline; "
    "try again later, or set a longer deadline",
)


@dataclass(frozen=True, slots=True)
class _Backlog:
    """Requests that are computed before another one: their cost, prompt tokens and number."""

    cost: float
    prompts: float
    count: float

    def plus(self, other: _Backlog, part: float) -> _Backlog:
        """With a part of other requests, from 0 to 1."""
        return _Backlog(
            self.cost + part * other.cost,
            self.prompts + part * other.prompts,
            self.count + part * other.count,
        )


class Forecast:
    """Predictions for waiting requests, from the queue and the measured rates."""

    def __init__(self, scheduler: Scheduler, rates: WorkRates) -> None:
        self._scheduler = scheduler
        self._queue = scheduler.queue
        self._costs = scheduler.costs
        self._rates = rates

    def refusal(self, request: Request, now: float) -> Failure | None:
        """Why a request that was just queued is not accepted; None if it is.

        Notes in it how much of its prompt it is expected to compute, if it has a deadline.
        """
        deadline = request.submit.deadline
        if deadline is not None:
            self._note_prompt(request)
        if len(self._queue) <= 1 or not self._rates.work_rate:
            return None
        wait = self._wait_seconds(request)
        most_seconds = self._scheduler.limits.max_queue_seconds
        if most_seconds and wait > most_seconds:
            text = f"the wait would be about {wait:.0f} s, more than {most_seconds:g}"
            return Failure(Reason.OVERLOADED, f"{text}; try again later")
        if deadline is None:
            return None
        own = self._own_seconds(request, self._step_seconds())
        if now + WAIT_MARGIN * wait + (MARGIN if wait > 0.0 else 1.0) * own <= deadline:
            return None
        text = (
            f"the request would wait about {wait:.3f} s and take {own:.3f} s, "
            f"but its deadline is in {deadline - now:.3f} s"
        )
        return Failure(Reason.DEADLINE_UNMEETABLE, f"{text}; set a longer one or try again later")

    def late(self, now: float) -> list[Request]:
        """Waiting requests, not begun, that cannot end before their deadlines any more."""
        step = self._costs.step_seconds
        return [
            request
            for request in self._queue
            if request.submit.deadline is not None
            and request.queue_seconds is None
            and now + LATE_MARGIN * self._own_seconds(request, step) > request.submit.deadline
        ]

    def _note_prompt(self, request: Request) -> None:
        if len(request.pins) == len(request.submit.adapters):
            request.to_compute = request.prompt_len - self._scheduler.prefixes.kept(request)
        else:  # what is kept of it depends on its adapters, for which it has not waited yet
            request.to_compute = 1

    def _own_seconds(self, request: Request, step_seconds: float) -> float:
        """Time from the start of a request to its end, if its answer is of usual length."""
        rate = self._rates.prompt_rate
        prompt = request.to_compute / rate if rate else 0.0
        return prompt + (self._new_tokens(request) - 1.0) * step_seconds

    def _step_seconds(self) -> float:
        """Duration of the steps to come, for a request that is queued now.

        As many requests will run as start, at the present rate, during an answer. The mean of that
        number and of the present one counts.
        """
        waiting, running = self._load(list(self._queue)), len(self._scheduler.running)
        base, slope = self._costs.expected()
        new = (waiting.cost - waiting.prompts) / NEW_COST
        per_second = new * self._rates.prompt_rate / waiting.prompts  # tokens of starting answers
        rows = min(self._scheduler.limits.max_running, running + waiting.count)
        if slope * per_second < 1.0:  # rows = per_second * (base + slope * rows)
            rows = min(rows, per_second * base / (1.0 - slope * per_second))
        return base + slope * (running + max(rows, running)) / 2.0

    def _new_tokens(self, request: Request) -> float:
        return self._rates.new_tokens(request.submit.max_new_tokens)

    def _cost(self, request: Request) -> float:
        return request.prompt_len + NEW_COST * self._new_tokens(request)

    def _wait_seconds(self, request: Request) -> float:
        """Time until a request starts, at measured rates; 0 if it starts at once."""
        rates, own = self._rates, request.account
        assert own is not None, "the wait of a request without an account"
        ahead = self._load([each for each in own.queue if each.order < request.order])
        # Accounts that come later with small counters pass it, which its pace tells beforehand.
        by_pace = ahead.cost / own.pace.value if own.pace.value else 0.0
        top = own.top
        if top.parts is not None:
            ahead = self._before(own, top.parts.waiting, ahead)
        ahead = self._before(top, self._queue.waiting, ahead)
        wait = ahead.cost / rates.work_rate
        if ahead.count <= self._scheduler.places and rates.prompt_rate:
            wait = min(wait, ahead.prompts / rates.prompt_rate)
        if by_pace > wait:
            everything = self._load(list(self._queue)).cost / rates.work_rate
            wait = max(wait, min(by_pace, MOST_BACKLOGS * everything))
        return wait

    def _load(self, requests: Collection[Request]) -> _Backlog:
        """The load of waiting requests."""
        prompts = float(sum(each.prompt_len for each in requests))
        return _Backlog(sum(map(self._cost, requests)), prompts, float(len(requests)))

    def _before(self, own: Account, others: Iterable[Account], ahead: _Backlog) -> _Backlog:
        """The load before a request of `own`: of `ahead`, its own, and of accounts beside it."""
        level = own.counter + ahead.cost / own.weight
        for account in others:
            before = (level - account.counter) * account.weight
            if account is own or before <= 0.0:
                continue
            all_of_it = self._load([each for leaf in account.leaves for each in leaf.queue])
            ahead = ahead.plus(all_of_it, min(1.0, before / all_of_it.cost))
        return ahead
