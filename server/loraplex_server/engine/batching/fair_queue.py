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

The accounts of an identified principal are parts of its own account, which is compared with those
of the others; its parts are compared with each other only. So a principal's share does not grow
with the number of its adapters.

    principal p   counter 700   parts: a  counter 300   r1 r2     p has the smallest counter, and
                                       b  counter 500   r3        a that of its parts: r1 starts
    principal q   counter 900   parts: a  counter 100   r4

Counters alone do not rule out that new accounts keep arriving, all with counters below that of an
account. So one start in `OLDEST_EVERY` goes to the first request in order, whatever the counters
are. It is charged like any other, so lasting shares are as the weights say.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

from loraplex_server.engine.batching.step_costs import NEW_COST, RecentRate

if TYPE_CHECKING:
    from loraplex_server.engine.batching.request import Request

PRIORITY_SECONDS = 0.2
"""Seconds of waiting that one level of priority is worth."""

MAX_PRIORITY = 10
"""Highest priority; the lowest is its negative. So no priority is worth more than 4 s of waiting
over another."""

HEAD_START = 256.0
"""Cost, as of one short request, by which an account that returns is ahead of those that wait."""

OLDEST_EVERY = 8
"""One start in so many goes to the first request in order."""

PACE_STEPS = 64
"""Steps over which the pace of an account is taken."""

KNOWN = 1024
"""Number of accounts without requests that are remembered."""

K = TypeVar("K")

_order = attrgetter("order")
_counter = attrgetter("counter")


class Account:
    """Whom requests are charged to.

    Attributes:
        counter: tokens computed for it, weighted by their cost and divided by its weight.
        weight: its share, in proportion to that of the other accounts.
        whole: the account of the principal that it is a part of; None if it is compared with all.
        parts: a principal's own accounts with waiting requests; None for one that has no parts.
        queue: its waiting requests, in their order; empty for an account with parts.
        open: number of its requests that wait or run.
        pace: cost of its tokens per second while it had waiting requests.
    """

    __slots__ = (
        "cost",
        "counter",
        "name",
        "noted",
        "noted_at",
        "open",
        "pace",
        "parts",
        "queue",
        "weight",
        "whole",
    )

    def __init__(
        self, name: str, weight: float, counter: float, whole: Account | None = None
    ) -> None:
        self.name = name
        self.weight = weight
        self.counter = counter
        self.whole = whole
        self.parts: Contest | None = None
        self.queue: list[Request] = []
        self.open = 0
        self.cost = 0.0  # of all its tokens
        self.noted, self.noted_at = 0.0, -1  # of `FairQueue.note`
        self.pace = RecentRate(PACE_STEPS // 4, PACE_STEPS)

    @property
    def top(self) -> Account:
        """The account that is compared with those of other callers: its principal's, or itself."""
        return self if self.whole is None else self.whole

    @property
    def leaves(self) -> Collection[Account]:
        """The accounts whose requests these are, of those with waiting ones."""
        return (self,) if self.parts is None else self.parts.waiting

    @property
    def waiting(self) -> int:
        """Number of its waiting requests."""
        return len(self.queue) if self.parts is None else sum(len(p.queue) for p in self.leaves)

    @property
    def foremost(self) -> Request:
        """The first of its waiting requests in order."""
        if self.parts is None:
            return self.queue[0]
        return min((part.queue[0] for part in self.leaves), key=_order)

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
        whole = self.whole
        if whole is not None:
            whole.counter += cost / whole.weight
        request.charged = end


class Contest:
    """Accounts that are compared with each other: those of all callers, or of one principal.

    Attributes:
        waiting: those with a waiting request.
    """

    __slots__ = ("_last", "_level", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Account, None] = {}
        self._last = Account("", 1.0, 0.0)
        self._level = 0.0

    def enter(self, account: Account) -> None:
        """Notes a new request of an account, which starts near the others if it had none."""
        if account in self.waiting:
            return
        floor = min(map(_counter, self.waiting), default=self._last.counter)
        self._level = max(self._level, floor)
        account.counter = max(account.counter, self._level - HEAD_START)
        self.waiting[account] = None

    def leave(self, account: Account) -> None:
        """Notes that an account has no waiting request any more."""
        del self.waiting[account]
        self._last = account


class FairQueue:
    """The waiting requests of all accounts."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` by the accounts' names; others have weight 1."""
        self._weights = weights
        self._accounts: dict[tuple[str, str], Account] = {}
        self._principals: dict[str, Account] = {}
        self._contest = Contest()
        self._seen: tuple[tuple[Account, float], ...] = ()
        self._count = 0
        self._starts = 0
        self._notes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        for account in self._contest.waiting:
            for leaf in account.leaves:
                yield from leaf.queue

    @property
    def waiting(self) -> list[Account]:
        """The accounts with a waiting request, those of principals as one each."""
        return list(self._contest.waiting)

    @property
    def waiting_accounts(self) -> int:
        """Number of accounts with a waiting request."""
        return sum(len(account.leaves) for account in self._contest.waiting)

    def join(self, request: Request) -> None:
        """Adds a request that has not been in the queue before, or that comes back to it."""
        account = self._account(request)
        top = account.top
        self._contest.enter(top)
        if account is not top:
            assert top.parts is not None, "a principal's account has no parts"
            top.parts.enter(account)
            top.open += 1
        account.open += 1
        request.account = account
        seen = [each for each in self._seen if each[0] is not top][:1]
        self._seen = ((top, request.arrived), *seen)
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """Adds a request that was running."""
        account = request.account
        assert account is not None, "a request without an account is queued"
        insort(account.queue, request, key=_order)
        top = account.top
        self._contest.waiting[top] = None
        if top.parts is not None:
            top.parts.waiting[account] = None
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
        if account.whole is not None:
            account.whole.open -= 1
        if len(self._accounts) > 2 * KNOWN:
            _forget(self._accounts)
            _forget(self._principals)

    def first(self, barred: Collection[Account] = ()) -> tuple[Request, bool] | None:
        """The request that starts next, of the accounts not in `barred`; None if there is none.

        With it comes whether it goes before everybody else, as the first in order.
        """
        able = [account for account in self._contest.waiting if account not in barred]
        if not able:
            return None
        if self._starts % OLDEST_EVERY == OLDEST_EVERY - 1:
            return min((account.foremost for account in able), key=_order), True
        least = min(able, key=_standing)
        if least.parts is not None:
            least = min(least.parts.waiting, key=_standing)
        return least.queue[0], False

    def note(self, seconds: float) -> None:
        """Notes a step, for the pace of the accounts that had waiting requests since the last."""
        self._notes += 1
        for account in (leaf for top in self._contest.waiting for leaf in top.leaves):
            if account.noted_at == self._notes - 1:
                account.pace.note(account.cost - account.noted, seconds)
            account.noted, account.noted_at = account.cost, self._notes

    def is_shared(self, time: float) -> bool:
        """Whether two accounts or more have requests, or have sent one since `time`.

        Those of a principal count as one.
        """
        if len(self._seen) < 2:
            return False
        account, seen = self._seen[1]
        return account.open > 0 or seen >= time

    @property
    def least_weight(self) -> float:
        """The smaller weight of the two accounts of the latest requests."""
        return min((account.weight for account, _ in self._seen), default=1.0)

    def _account(self, request: Request) -> Account:
        principal, name = request.submit.principal, request.submit.account
        whole = None
        if principal:
            whole = self._principals.get(principal)
            if whole is None:
                whole = self._principals[principal] = Account(principal, 1.0, 0.0)
                whole.parts = Contest()
            whole.weight = request.submit.weight
        account = self._accounts.get((principal, name))
        if account is None or account.whole is not whole:
            account = Account(name, self._weights.get(name, 1.0), 0.0, whole)
            self._accounts[principal, name] = account
        return account

    def _remove(self, request: Request) -> None:
        account = request.account
        assert account is not None, "a request without an account was queued"
        at = bisect_left(account.queue, request.order, key=_order)
        assert account.queue[at] is request, "a request is not where its state says"
        del account.queue[at]
        self._count -= 1
        if account.queue:
            return
        top = account.top
        if top.parts is not None:
            top.parts.leave(account)
            if top.parts.waiting:
                return
        self._contest.leave(top)


def _standing(account: Account) -> tuple[float, int, tuple[float, int]]:
    """Sort key of accounts with waiting requests: whose turn it is comes first."""
    return account.counter, account.waiting, account.foremost.order


def _forget(accounts: dict[K, Account]) -> None:
    """Forgets accounts without requests: those with the smallest counters, which owe least."""
    idle = sorted(
        ((key, each) for key, each in accounts.items() if not each.open),
        key=lambda found: found[1].counter,
    )
    for key, _ in idle[: max(0, len(idle) - KNOWN)]:
        del accounts[key]
