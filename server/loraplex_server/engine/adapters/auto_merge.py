"""When merging an adapter by itself pays: a policy that tries, measures and takes back.

An adapter that has most of the rows may be cheaper to serve from dense copies; whether it is
depends on the machine, the ranks and the traffic, so it is measured and not modelled. Steps are put
in buckets of like work (rows and tokens, each within a factor of 1.4). Once an adapter has had
`upper` of the rows over a whole window, and enough steps have been timed unmerged, it is tried
merged; when as many have been timed in the same buckets, it stays if the medians say that a step
became shorter by `margin`. It leaves when its share falls below `lower`, or when the measurement no
longer speaks for it. A try that failed is repeated after a time that doubles with each failure.

The thresholds apart (hysteresis) are the idea of dLoRA (B. Wu et al., "dLoRA: Dynamically
Orchestrating Requests and Adapters for LoRA LLM Serving", OSDI 2024), which switches the whole
replica; here only the rows of one adapter change their way.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from statistics import median

Bucket = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MergePolicy:
    """The knobs of the automatic mode.

    Attributes:
        upper, lower: shares of all rows above which an adapter is tried, and below which it leaves;
            `upper` is above one half, so at most one adapter has it.
        window: steps over which shares are taken.
        samples: steps that a bucket needs, unmerged and merged, before its medians count.
        warmup: first merged steps that are not timed (their copies are not in any cache yet).
        trial: merged steps after which a try that could not be measured is given up.
        margin: part of a step's time that merging must save.
        backoff, longest_backoff: seconds between the end of a try and the next one.
    """

    upper: float = 0.6
    lower: float = 0.3
    window: int = 256
    samples: int = 24
    warmup: int = 4
    trial: int = 1024
    margin: float = 0.05
    backoff: float = 30.0
    longest_backoff: float = 3600.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.lower < self.upper <= 1.0 or self.upper <= 0.5:
            raise ValueError("lower must be below upper, and upper above one half")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median seconds of like steps, averaged over the buckets by their merged steps."""

    unmerged: float
    merged: float


class Move(Enum):
    """What the policy wants done with an adapter."""

    TRY = "try"
    KEEP = "keep"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Decision:
    """A move, and what was measured, if it was."""

    kind: Move
    digest: str
    measurement: Measurement | None = None


class _Phase(Enum):
    WATCHING = "watching"
    ASKED = "asked"
    TRIAL = "trial"
    KEPT = "kept"


class AutoMerge:
    """Watches the steps and decides about one adapter at a time, the `subject`."""

    def __init__(self, policy: MergePolicy) -> None:
        self.policy = policy
        self.subject: str | None = None
        self._phase = _Phase.WATCHING
        self._window: deque[tuple[dict[str, int], int]] = deque()
        self._rows: Counter[str] = Counter()
        self._total = 0
        self._before: dict[Bucket, deque[float]] = {}
        self._after: dict[Bucket, deque[float]] = {}
        self._merged_steps = 0
        self._pays = False
        self._failures: dict[str, tuple[int, float]] = {}

    # what is seen

    def observe(
        self, rows: Mapping[str, int], total: int, tokens: int, seconds: float, quiet: bool
    ) -> None:
        """Takes in a step.

        `rows` counts those that use one adapter alone at weight 1, `total` all; the pass took
        `seconds`. Unless `quiet`, other work went on beside it and its time tells nothing.
        """
        self._slide(dict(rows), total)
        if self._phase is _Phase.WATCHING:
            self._watch()
        if self.subject is None or not total or self._phase is _Phase.ASKED:
            return
        if self._phase is not _Phase.WATCHING:
            self._merged_steps += 1
            if self._merged_steps <= self.policy.warmup:
                return
        if quiet and 2 * rows.get(self.subject, 0) >= total:
            into = self._before if self._phase is _Phase.WATCHING else self._after
            times = into.setdefault(_bucket(total, tokens), deque(maxlen=4 * self.policy.samples))
            times.append(seconds)

    def merged(self) -> None:
        """The try that was asked for has begun."""
        self._phase = _Phase.TRIAL
        self._merged_steps = 0
        self._after.clear()

    def failed(self, now: float) -> None:
        """The try that was asked for could not begin."""
        self._back_off(now)
        self.reset()

    def gone(self, now: float) -> None:
        """The subject is merged no more, by a decision or because it had to go."""
        if self._pays:
            assert self.subject is not None
            self._failures[self.subject] = (0, now + self.policy.backoff)
        else:
            self._back_off(now)
        self.reset()

    def reset(self) -> None:
        """Forgets the subject; whatever happens to its copies is no longer decided here."""
        self.subject = None
        self._phase = _Phase.WATCHING
        self._pays = False
        self._before.clear()
        self._after.clear()

    # what is decided

    @property
    def measurement(self) -> Measurement | None:
        """What merging does to a step, as far as it was measured."""
        enough = self.policy.samples
        common = [
            (len(after), median(self._before[bucket]), median(after))
            for bucket, after in self._after.items()
            if len(after) >= enough and len(self._before.get(bucket, ())) >= enough
        ]
        weight = sum(count for count, _, _ in common)
        if not weight:
            return None
        unmerged = sum(count * before for count, before, _ in common) / weight
        return Measurement(unmerged, sum(count * after for count, _, after in common) / weight)

    def decide(self, now: float) -> Decision | None:
        """What should be done now, if anything. A `LEAVE` is repeated until `gone` is called."""
        if self.subject is None:
            return None
        share = self._share(self.subject)
        match self._phase:
            case _Phase.WATCHING:
                if share >= self.policy.upper and self._may_try(self.subject, now):
                    self._phase = _Phase.ASKED
                    return Decision(Move.TRY, self.subject)
            case _Phase.TRIAL:
                measured = self.measurement
                if measured is not None and self._is_shorter(measured):
                    self._phase, self._pays = _Phase.KEPT, True
                    return Decision(Move.KEEP, self.subject, measured)
                given_up = self._merged_steps >= self.policy.trial or share < self.policy.lower
                if measured is not None or given_up:
                    return Decision(Move.LEAVE, self.subject, measured)
            case _Phase.KEPT:
                if share >= self.policy.lower and self._merged_steps % self.policy.samples:
                    return None
                measured = self.measurement
                self._pays = measured is not None and measured.merged < measured.unmerged
                if not self._pays or share < self.policy.lower:
                    return Decision(Move.LEAVE, self.subject, measured)
        return None

    def _slide(self, rows: dict[str, int], total: int) -> None:
        self._window.append((rows, total))
        self._rows.update(rows)
        self._total += total
        if len(self._window) > self.policy.window:
            old, count = self._window.popleft()
            self._total -= count
            for digest, number in old.items():
                self._rows[digest] -= number
                if not self._rows[digest]:
                    del self._rows[digest]

    def _watch(self) -> None:
        """Makes the adapter with most rows the subject; timing starts afresh when it changes."""
        leader = max(self._rows, key=self._rows.__getitem__, default=None)
        if leader != self.subject:
            self.subject = leader
            self._before.clear()

    def _share(self, digest: str) -> float:
        return self._rows[digest] / self._total if self._total else 0.0

    def _may_try(self, digest: str, now: float) -> bool:
        timed = max(map(len, self._before.values()), default=0)
        ready = len(self._window) == self.policy.window and timed >= self.policy.samples
        return ready and now >= self._failures.get(digest, (0, now))[1]

    def _is_shorter(self, measured: Measurement) -> bool:
        return measured.merged <= measured.unmerged * (1.0 - self.policy.margin)

    def _back_off(self, now: float) -> None:
        assert self.subject is not None
        failures = self._failures.get(self.subject, (0, 0.0))[0] + 1
        wait = min(self.policy.backoff * 2.0 ** (failures - 1), self.policy.longest_backoff)
        self._failures[self.subject] = (failures, now + wait)
        # Who has not been tried for long starts anew, so this table stays small.
        longest = self.policy.longest_backoff
        self._failures = {d: f for d, f in self._failures.items() if now < f[1] + longest}


def _bucket(rows: int, tokens: int) -> Bucket:
    return round(2 * math.log2(rows)), round(2 * math.log2(max(tokens, 1)))
