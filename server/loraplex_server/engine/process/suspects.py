"""Which adapters and requests may have caused the end of an engine process.

An adapter is a suspect if it was being loaded or merged when a process ended. Suspects are not
loaded again automatically, and later at most one of them is loaded or merged at a time, and not
while a request that ran at the last end is on its way to its first token. So two suspects are not
counted together, and an adapter that was only there by chance is cleared by its next load. An
adapter that was a suspect at `adapter_deaths` ends is quarantined.

A request is recognised by its content, because clients retry with new ids. It is quarantined if it
ran at `request_deaths` ends in a row and is the only one that did; several that did are begun one
after the other from then on. A request that finishes is cleared.

The engines of a server share what is counted: a request or an adapter that ended one of them may be
sent to another.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from loraplex_server.engine.messages import Attempt, LoadDone, MergeDone, Submit, files_digest
from loraplex_server.engine.process.limits import SupervisionLimits

REQUEST_SECONDS: Final = 3600.0
"""Seconds after which a quarantined request is allowed again, and a suspect one is forgotten."""
MOST_REQUESTS: Final = 256
"""Most quarantined requests that are kept; beyond it the oldest is allowed again."""
CONFINED_DEATHS: Final = 2
"""Number of ends in a row after which a request is sent to no other engine than the last one."""

_DOING: Final = {"load": "loaded", "merge": "merged"}


@dataclass(frozen=True, slots=True)
class LossReport:
    """What follows from the end of a process for adapters and requests.

    Attributes:
        suspects: digests of the adapters that were being loaded or merged.
        quarantined: those of them that are quarantined now, each with the reason.
        requests: number of requests that are quarantined now.
    """

    suspects: frozenset[str] = frozenset()
    quarantined: dict[str, str] = field(default_factory=dict)
    requests: int = 0


class Evidence:
    """What the ends of the engines of one server say about adapters and requests.

    Attributes:
        adapters: number of ends during work on an adapter, by its digest and the work.
        requests: for each engine, the requests that ran at its last end and have not finished
            since, each with the number of ends in a row at which it ran.
        refused: quarantined requests, each with the time at which it is allowed again.
        quarantined: digests of quarantined adapters, each with the reason.
        died_at: time of the last end of any engine.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.adapters: Counter[tuple[str, str]] = Counter()
        self.requests: list[dict[bytes, int]] = []
        self.refused: dict[bytes, float] = {}
        self.quarantined: dict[str, str] = {}
        self.died_at = clock()

    def add_engine(self) -> dict[bytes, int]:
        """Adds an engine, and returns its entry of `requests`."""
        self.requests.append({})
        return self.requests[-1]

    def count(self, content: bytes) -> int:
        """Number of ends in a row at which a request ran; 0 if it has finished since."""
        return max(ran.get(content, 0) for ran in self.requests)

    def clear(self, content: bytes) -> None:
        """Drops what was counted against a request."""
        for ran in self.requests:
            ran.pop(content, None)

    def confined_to(self, request: Submit) -> int | None:
        """The only engine that a request may be sent to, as a number; None if it is any.

        A request that may have ended two engines is not sent to the others.
        """
        if not any(self.requests):
            return None
        content = content_of(request)
        counts = [ran.get(content, 0) for ran in self.requests]
        return counts.index(max(counts)) if max(counts) >= CONFINED_DEATHS else None


class Suspects:
    """The suspects of one engine; `evidence` is shared by the engines of a server."""

    def __init__(
        self,
        limits: SupervisionLimits,
        clock: Callable[[], float] = time.monotonic,
        evidence: Evidence | None = None,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._evidence = evidence or Evidence(clock)
        self._ran = self._evidence.add_engine()

    # adapters

    def attempt(self, attempt: Attempt) -> None:
        """Notes that work on an adapter begins or has ended, in whosever copy."""
        key = files_digest(attempt.digest), attempt.work
        self._attempts[key] += 1 if attempt.begun else -1
        if not self._attempts[key]:
            del self._attempts[key]

    def is_suspect(self, digest: str) -> bool:
        """Whether a process ended during work on the adapter, which has not succeeded since."""
        files = files_digest(digest)
        return any(suspect == files for suspect, _ in self._evidence.adapters)

    def on_load(self, done: LoadDone) -> None:
        """Clears an adapter whose load has ended, even with an error: the process survived it."""
        del self._evidence.adapters[files_digest(done.digest), "load"]

    def on_merge(self, done: MergeDone) -> None:
        """Clears an adapter whose merge has ended, even with an error."""
        if done.merged:
            del self._evidence.adapters[files_digest(done.digest), "merge"]

    def forget(self, digest: str) -> None:
        """Drops everything that was counted against an adapter."""
        for work in _DOING:
            del self._evidence.adapters[digest, work]

    # requests

    def ran_at_last_end(self, request: Submit) -> bool:
        """Whether a request ran when the last process ended, and has not finished since."""
        if not any(self._evidence.requests):
            return False
        if self._clock() - self._evidence.died_at > REQUEST_SECONDS:
            for ran in self._evidence.requests:
                ran.clear()  # whoever sent them has given up
            return False
        return self._evidence.count(content_of(request)) > 0

    def is_one_of_several(self, request: Submit) -> bool:
        """Whether a request would be refused if others had not run at the same ends."""
        return self._evidence.count(content_of(request)) >= self._limits.request_deaths

    def refuses(self, request: Submit) -> bool:
        """Whether a request is quarantined."""
        refused = self._evidence.refused
        if not refused:
            return False
        content = content_of(request)
        until = refused.get(content)
        if until is not None and until <= self._clock():
            del refused[content]
            return False
        return until is not None

    def on_finish(self, request: Submit) -> None:
        """Clears a request that has finished."""
        if any(self._evidence.requests):
            self._evidence.clear(content_of(request))

    # the end of a process

    def on_death(self, requests: Iterable[Submit]) -> LossReport:
        """Counts the end of a process, which had `requests` to compute and did not finish them."""
        attempts, self._attempts = set(self._attempts), Counter()
        suspects = frozenset(digest for digest, _ in attempts)
        self._evidence.adapters.update(attempts)
        quarantined: dict[str, str] = {}
        for digest, work in attempts:
            count = self._evidence.adapters[digest, work]
            if count >= self._limits.adapter_deaths:
                quarantined[digest] = (
                    f"the engine process ended {count} times while the adapter was being "
                    f"{_DOING.get(work, work)}"
                )
        for digest in quarantined:
            self.forget(digest)
        # A request whose adapter was being loaded had not run yet.
        ran = {
            content_of(request)
            for request in requests
            if not any(files_digest(ref.digest) in suspects for ref in request.adapters)
        }
        return LossReport(suspects, quarantined, self._count_requests(ran))

    def _count_requests(self, ran: set[bytes]) -> int:
        """Counts an end for the requests that ran; returns how many are quarantined for it."""
        evidence = self._evidence
        evidence.died_at = self._clock()
        counts = {content: evidence.count(content) + 1 for content in ran}
        self._ran.clear()
        self._ran.update(counts)
        worst = [c for c, n in counts.items() if n >= self._limits.request_deaths]
        if len(worst) != 1:
            return 0
        while len(evidence.refused) >= MOST_REQUESTS:
            del evidence.refused[next(iter(evidence.refused))]
        evidence.refused[worst[0]] = self._clock() + REQUEST_SECONDS
        evidence.clear(worst[0])
        return 1


def content_of(request: Submit) -> bytes:
    """Digest of what a request computes.

    Its ids, deadline, priority, payer, salt of the prefix cache and seed are left out.
    """
    sampling = msgspec.structs.replace(request.sampling, seed=0)
    plain = msgspec.structs.replace(
        request,
        id=0,
        request_id="",
        deadline=None,
        priority=0,
        account="",
        cache_salt="",
        principal="",
        weight=1.0,
        sampling=sampling,
    )
    return hashlib.blake2b(msgspec.msgpack.encode(plain), digest_size=16).digest()
