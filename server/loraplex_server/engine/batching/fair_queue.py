"""The queue: whose request starts next, by what each account has been given so far.

Each account has a counter of the tokens that were computed for it, divided by its weight. The next
request is that of the waiting account with the smallest counter: the virtual token counter of
Y. Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024. An account that returns
after a pause, or is new, starts at the smallest counter of those that wait, so nobody saves up for
later by asking for nothing; less `HEAD_START`, so that its first request is not one of many.

Within an account requests are served in their order: the time of arrival, less `PRIORITY_SECONDS`
for each level of priority. A priority therefore moves a request ahead of others of its own account
only, and by a bounded time.

    account a   counter 1200   r1 r4 r5      starts third
    account b   counter  900   r2            starts first: r2
    account c   counter  900   r3 r6         starts second: equal counters, more requests

Counters alone do not rule out that new accounts keep arriving, all with counters below that of an
account. So one start in `OLDEST_EVERY` goes to the first request in order, whatever the counters
are. It is charged like any other, so lasting shares are as the weights say.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from loraplex_server.engine.batching.recent_rate import RecentRate

if TYPE_CHECKING:
    from loraplex_server.engine.batching.request import Request

PRIORITY_SECONDS = 0.2
"""Seconds of waiting that one level of priority is worth."""

MAX_PRIORITY = 10
"""Highest priority; the lowest is its negative. So no priority is worth more than 4 s of waiting
over another."""

NEW_COST = 2
"""Cost of a generated token, where a token of a prompt costs 1."""

HEAD_START = 256.0
"""Cost, as of one short request, by which an account that returns is ahead of those that wait."""

OLDEST_EVERY = 8
"""One start in so many goes to the first request in order."""

PACE_STEPS = 64
"""Steps over which the pace of an account is taken."""

KNOWN = 1024
"""Number of accounts without requests that are remembered."""

_order = attrgetter("order")


class Account:
    """Whom requests are charged to.

    Attributes:
        counter: tokens computed for it, weighted by their cost and divided by its weight.
        weight: its share, in proportion to that of the other accounts.
        queue: its waiting requests, in their order.
        open: number of its requests that wait or run.
        pace: cost of its tokens per second while it had waiting requests.
    """

    __slots__ = ("cost", "counter", "name", "noted", "noted_at", "open", "pace", "queue", "weight")

    def __init__(self, name: str, weight: float, counter: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = counter
        self.queue: list[Request] = []
        self.open = 0
        self.cost = 0.0  # of all its tokens
        self.noted, self.noted_at = 0.0, -1  # of `FairQueue.note`
        self.pace = RecentRate(PACE_STEPS // 4, PACE_STEPS)

    def charge(self, request: Request, end: int) -> None:
        """Charges the tokens of a request before index `end` that were not charged before.

        A token that is computed again, after a preemption, costs nothing.
        """
        charged = request.charged
        if end <= charged:
            return
        prompt = min(end, request.prompt_len) - charged
        if prompt > 0:
            cost = prompt + NEW_COST * (end - charged - prompt)
        else:
            cost = NEW_COST * (end - charged)
        self.cost += cost
        self.counter += cost / self.weight
        request.charged = end


class FairQueue:
    """The waiting requests of all accounts."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` by the accounts' names; others have weight 1."""
        self._weights = weights
        self._accounts: dict[str, Account] = {}
        self._waiting: dict[Account, None] = {}
        self._last = Account("", 1.0, 0.0)
        self._seen: tuple[tuple[Account, float], ...] = ()
        self._level = 0.0
        self._count = 0
        self._starts = 0
        self._notes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for account in self._waiting:
            yield from account.queue

    @property
    def waiting(self) -> list[Account]:
        """The accounts with a waiting request."""
        return list(self._waiting)

    @property
    def waiting_accounts(self) -> int:
        """Number of accounts with a waiting request."""
        return len(self._waiting)

    def join(self, request: Request) -> None:
        """Adds a request that has not been in the queue before, or that comes back to it."""
        account = self._account(request.submit.account)
        if not account.queue:
            floor = min((each.counter for each in self._waiting), default=self._last.counter)
            self._level = max(self._level, floor)
            account.counter = max(account.counter, self._level - HEAD_START)
        account.open += 1
        request.account = account
        seen = [each for each in self._seen if each[0] is not account][:1]
        self._seen = ((account, request.arrived), *seen)
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """Adds a request that was running."""
        account = request.account
        assert account is not None, "a request without an account is queued"
        insort(account.queue, request, key=_order)
        self._waiting[account] = None
        self._count += 1

    def take(self, request: Request) -> None:
        """Removes a request that starts."""
        self._starts += 1
        self._remove(request)

    def drop(self, request: Request) -> None:
        """Removes a request that ends, or that does not wait here any more."""
        self._remove(request)
        self.leave(request)

    def leave(self, request: Request) -> None:
        """Notes that a request neither waits nor runs any more."""
        account = request.account
        assert account is not None, "a request without an account was running"
        account.open -= 1
        if len(self._accounts) > 2 * KNOWN:
            self._forget()

    def first(self, barred: Collection[Account] = ()) -> tuple[Request, bool] | None:
        """The request that starts next, of the accounts not in `barred`; None if there is none.

        With it comes whether it goes before everybody else, as the first in order.
        """
        able = [account for account in self._waiting if account not in barred]
        if not able:
            return None
        if self._starts % OLDEST_EVERY == OLDEST_EVERY - 1:
            return min((account.queue[0] for account in able), key=_order), True
        least = min(able, key=lambda each: (each.counter, len(each.queue), each.queue[0].order))
        return least.queue[0], False

    def note(self, seconds: float) -> None:
        """Notes a step, for the pace of the accounts that had waiting requests since the last."""
        self._notes += 1
        for account in self._waiting:
            if account.noted_at == self._notes - 1:
                account.pace.note(account.cost - account.noted, seconds)
            account.noted, account.noted_at = account.cost, self._notes

    def is_shared(self, time: float) -> bool:
        """Whether two accounts or more have requests, or have sent one since `time`."""
        if len(self._seen) < 2:
            return False
        account, seen = self._seen[1]
        return account.open > 0 or seen >= time

    @property
    def least_weight(self) -> float:
        """The smaller weight of the two accounts of the latest requests."""
        return min((account.weight for account, _ in self._seen), default=1.0)

    def _account(self, name: str) -> Account:
        account = self._accounts.get(name)
        if account is None:
            account = Account(name, self._weights.get(name, 1.0), 0.0)
            self._accounts[name] = account
        return account

    def _remove(self, request: Request) -> None:
        account = request.account
        assert account is not None, "a request without an account was queued"
        at = bisect_left(account.queue, request.order, key=_order)
        assert account.queue[at] is request, "a request is not where its state says"
        del account.queue[at]
        self._count -= 1
        if not account.queue:
            del self._waiting[account]
            self._last = account

    def _forget(self) -> None:
        """Forgets accounts without requests: those with the smallest counters, which owe least."""
        idle = sorted(
            (each for each in self._accounts.values() if not each.open),
            key=attrgetter("counter"),
        )
        for account in idle[: max(0, len(idle) - KNOWN)]:
            del self._accounts[account.name]
