"""Limits of principals on generations: their rate, their tokens, and how many there are at once.

    request --enter--> place taken --prompt--> tokens taken --begin--> runs --generated--> ... exit
               |                        |
            refused                  refused: what was taken is given back

Requests and tokens per minute are token buckets (`Bucket`). The tokens of a prompt must be there
before the request goes on. Generated tokens are taken as they are produced and may overdraw the
bucket, so that no stream is cut; later requests then wait for the refill. A request that the server
refused before it computed anything costs nothing.

All limits are those of one server process. Callers that are not identified have none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Final, Protocol

from loraplex_model.base.refusal import Reason, Refusal, quota_exceeded

from loraplex_server.access.limits.buckets import MINUTE, Bucket
from loraplex_server.access.principals import Principal, PrincipalLimits

PAUSE_SECONDS: Final = 0.5
"""Pause that a client is told where a place is lacking: when a request ends is not known."""

UNCOMPUTED: Final = frozenset(
    {
        Reason.QUOTA_EXCEEDED,
        Reason.OVERLOADED,
        Reason.DRAINING,
        Reason.ENGINE_RESTARTED,
        Reason.STORE_UNAVAILABLE,
        Reason.DEADLINE_UNMEETABLE,
    }
)
"""Reasons for which the server refuses a request that it has computed nothing of."""


class Quotas:
    """What each principal has in use. For one thread.

    The state of a principal is kept while it differs from that of one that has never called, and
    at most a minute longer.
    """

    def __init__(
        self,
        max_requests: int,
        max_waiting_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_requests` places and `max_waiting_tokens` are what a `queue_share` is part of."""
        self._max_requests = max_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._clock = clock
        self._uses: dict[str, _Use] = {}
        self._swept_at = clock()

    def __len__(self) -> int:
        """Number of principals with a state."""
        return len(self._uses)

    def enter(self, principal: Principal, requests: int = 1) -> Allowance:
        """Takes the places of a call's requests, a context manager. Raises Refusal(QUOTA_EXCEEDED).

        All requests of a call have the same prompt.
        """
        if not principal.name:
            return _UNLIMITED
        now, limits = self._clock(), principal.limits
        if now - self._swept_at >= MINUTE:
            self._sweep(now)
        use = self._uses.get(principal.name)
        if use is None:
            use = self._uses[principal.name] = _Use()
        use.follow(limits, now)
        self._require_places(principal, use, requests)
        if use.requests is not None and (wait := use.requests.wait(requests, now)) > 0:
            text = f"may begin {use.requests.per_minute} requests a minute"
            if wait == math.inf:
                text += f"; the call has {requests}, so it is never accepted"
            raise quota_exceeded(
                principal.name, "requests_per_minute", text + _from_when(wait), wait
            )
        if use.tokens is not None and (wait := use.tokens.wait(1, now)) > 0:
            text = f"may use {use.tokens.per_minute} tokens a minute and has used them"
            raise quota_exceeded(principal.name, "tokens_per_minute", text + _from_when(wait), wait)
        return _Taken(self, principal, use, requests)

    def _require_places(self, principal: Principal, use: _Use, requests: int) -> None:
        limits = principal.limits
        bounds = [("concurrent_requests", limits.concurrent_requests, "")]
        if (share := limits.queue_share) is not None:
            places = _part(share, self._max_requests)
            bounds.append(("queue_share", places, f", which is {share:g} of all places"))
        for limit, most, which in bounds:
            if most is None or use.active + requests <= most:
                continue
            text = f"has {use.active} requests in the server and may have {most}{which}"
            if requests > 1:
                text += f"; the call has {requests}"
            is_never = requests > max(1, most)
            text += ", so it is never accepted" if is_never else ""
            wait = math.inf if is_never else PAUSE_SECONDS
            raise quota_exceeded(principal.name, limit, text, wait)

    def _require_prompt(
        self, principal: Principal, use: _Use, requests: int, each: int, now: float
    ) -> None:
        tokens = requests * each
        has = f"the prompt has {each}" + (f", {requests} times" if requests > 1 else "")
        if use.tokens is not None and (wait := use.tokens.wait(tokens, now)) > 0:
            most = use.tokens.per_minute
            text = f"may use {most} tokens a minute; {has}"
            text += ", so it is never accepted" if tokens > most else _from_when(wait)
            raise quota_exceeded(principal.name, "tokens_per_minute", text, wait)
        share = principal.limits.queue_share
        # A prompt of any size may wait alone; otherwise a long one could never be answered.
        if share is None or not use.waiting_tokens:
            return
        room = _part(share, self._max_waiting_tokens)
        if use.waiting_tokens + tokens > room:
            text = (
                f"has {use.waiting_tokens} prompt tokens waiting and may have {room}, which is "
                f"{share:g} of all; {has}"
            )
            raise quota_exceeded(principal.name, "queue_share", text, PAUSE_SECONDS)

    def retain(self, names: Collection[str]) -> None:
        """Forgets the principals that are not among `names` and have no request."""
        for name in [n for n, use in self._uses.items() if n not in names and not use.active]:
            del self._uses[name]

    def _sweep(self, now: float) -> None:
        self._swept_at = now
        for name in [n for n, use in self._uses.items() if use.is_fresh(now)]:
            del self._uses[name]


class _Use:
    """What one principal has in use."""

    __slots__ = ("active", "requests", "tokens", "waiting_tokens")

    def __init__(self) -> None:
        self.active = 0
        self.waiting_tokens = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None

    def follow(self, limits: PrincipalLimits, now: float) -> None:
        """Makes the buckets those of `limits`, which may have changed."""
        self.requests = _resized(self.requests, limits.requests_per_minute, now)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now)

    def is_fresh(self, now: float) -> bool:
        """Whether it is as if the principal had never called."""
        buckets = (self.requests, self.tokens)
        return not self.active and all(each is None or each.is_full(now) for each in buckets)


class Allowance(Protocol):
    """What a call's requests have taken of their principal's limits.

    Leaving the context frees their places.
    """

    def __enter__(self) -> Allowance:
        """Takes the places."""

    def prompt(self, tokens: int) -> None:
        """Takes the prompt's tokens for each request, which wait from now on.

        Raises Refusal(QUOTA_EXCEEDED).
        """

    def begin(self) -> None:
        """Notes that the prompt of a request is computed, so that it does not wait any more."""

    def generated(self, tokens: int) -> None:
        """Takes tokens that were produced. Never refuses."""

    def end(self) -> None:
        """Frees the place of a request that has ended, unless it is the call's last one."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the places; a call that nothing was computed of gets everything back."""


class _Unlimited:
    """The allowance of callers without limits."""

    __slots__ = ()

    def __enter__(self) -> Allowance:
        return self

    def prompt(self, tokens: int) -> None:
        pass

    def begin(self) -> None:
        pass

    def generated(self, tokens: int) -> None:
        pass

    def end(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_UNLIMITED: Final = _Unlimited()


class _Taken:
    """The allowance of a principal's call."""

    __slots__ = (
        "_begun",
        "_places",
        "_principal",
        "_prompt",
        "_quotas",
        "_requests",
        "_taken",
        "_use",
        "_waiting",
    )

    def __init__(self, quotas: Quotas, principal: Principal, use: _Use, requests: int) -> None:
        self._quotas = quotas
        self._principal = principal
        self._use = use
        self._requests = self._places = requests
        self._taken = 0
        self._prompt = 0
        self._waiting = 0
        self._begun = False

    def __enter__(self) -> Allowance:
        self._use.active += self._requests
        if self._use.requests is not None:
            self._use.requests.take(self._requests, self._quotas._clock())
        return self

    def prompt(self, tokens: int) -> None:
        now, requests = self._quotas._clock(), self._requests
        self._quotas._require_prompt(self._principal, self._use, requests, tokens, now)
        self._prompt = tokens
        self._waiting = requests * tokens
        self._use.waiting_tokens += self._waiting
        self._take(self._waiting, now)

    def begin(self) -> None:
        self._begun = True
        self._use.waiting_tokens -= self._prompt
        self._waiting -= self._prompt

    def generated(self, tokens: int) -> None:
        if self._use.tokens is not None:
            self._take(tokens, self._quotas._clock())

    def end(self) -> None:
        if self._places > 1:
            self._places -= 1
            self._use.active -= 1

    def _take(self, tokens: int, now: float) -> None:
        if self._use.tokens is not None:
            self._use.tokens.take(tokens, now)
            self._taken += tokens

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        use = self._use
        use.active -= self._places
        use.waiting_tokens -= self._waiting
        if self._begun or not isinstance(error, Refusal) or error.reason not in UNCOMPUTED:
            return
        now = self._quotas._clock()
        if use.requests is not None:
            use.requests.give_back(self._requests, now)
        if use.tokens is not None:
            use.tokens.give_back(self._taken, now)


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket


def _part(share: float, whole: int) -> int:
    """A share of a whole number, at least one unless the share is 0."""
    return max(1, int(share * whole)) if share > 0 else 0


def _from_when(wait: float) -> str:
    return "" if wait == math.inf else f"; try again in {math.ceil(wait * 10) / 10:g} s"
