"""Automatic merging: a policy that tries a merge, measures it, and keeps it or takes it back.

An adapter that has most of the rows may be cheaper to serve from dense copies. Whether it is
depends on the machine, the ranks and the traffic, so it is measured and not modelled. Steps are put
into buckets of similar work (rows and tokens, each within a factor of 1.4). An adapter that has had
`upper` of the rows over a whole window, with enough steps timed unmerged, is tried merged. When as
many steps of the same buckets have been timed, the merge is kept if the medians show that a step
became shorter by `margin`. It is taken back when the adapter's share falls below `lower`, or when
the measurement no longer shows a gain. The pause after a failed try doubles with each failure.

The separate thresholds (hysteresis) are the idea of dLoRA (B. Wu et al., "dLoRA: Dynamically
Orchestrating Requests and Adapters for LoRA LLM Serving", OSDI 2024), which switches the whole
replica; here only the rows of one adapter change.

    WATCHING --TRY--> ASKED --merged()--> TRIAL --KEEP--> KEPT
        ^               |                   | LEAVE         | LEAVE
        +---------------+----- ended() -----+---------------+
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
    """Thresholds of automatic merging.

    Attributes:
        upper: share of all rows from which an adapter is tried; above one half, so that at most one
            adapter has it.
        lower: share of all rows below which a merge is taken back.
        window: number of steps over which shares are taken.
        samples: steps that a bucket needs, unmerged and merged each, before its medians count.
        warmup: first merged steps that are not timed (the copies are not in any cache yet).
        trial: merged steps after which a try without a measurement is taken back.
        margin: fraction of a step's time that merging must save.
        backoff: seconds between the first failed try and the next one.
        longest_backoff: upper bound of that pause in seconds.
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
    """Median seconds of similar steps, averaged over the buckets by their merged steps."""

    unmerged: float
    merged: float


class Move(Enum):
    """Action of the policy for one adapter."""

    TRY = "try"
    KEEP = "keep"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Decision:
    """An action, and the measurement behind it if there was one."""

    kind: Move
    digest: str
    measurement: Measurement | None = None


class _Phase(Enum):
    WATCHING = "watching"
    ASKED = "asked"
    TRIAL = "trial"
    KEPT = "kept"


class AutoMerge:
    """The policy at work: it observes steps and decides about one adapter at a time, `subject`."""

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

    # observations

    def observe(
        self, rows: Mapping[str, int], total: int, tokens: int, seconds: float, is_quiet: bool
    ) -> None:
        """Notes one step, whose forward pass took `seconds`.

        `rows` counts the rows that use one adapter alone at weight 1, by digest; `total` counts all
        rows. A pass that was not `is_quiet` ran alongside loader tasks, so its time is not used.
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
        if is_quiet and 2 * rows.get(self.subject, 0) >= total:
            into = self._before if self._phase is _Phase.WATCHING else self._after
            times = into.setdefault(_bucket(total, tokens), deque(maxlen=4 * self.policy.samples))
            times.append(seconds)

    def merged(self) -> None:
        """Notes that the merge decided by `Move.TRY` is in use."""
        self._phase = _Phase.TRIAL
        self._merged_steps = 0
        self._after.clear()

    def ended(self, now: float) -> None:
        """Notes that the subject is not merged: its try failed, or its copies were dropped."""
        if self._pays:
            assert self.subject is not None
            self._failures[self.subject] = (0, now + self.policy.backoff)
        else:
            self._back_off(now)
        self.reset()

    def reset(self) -> None:
        """Forgets the subject: its copies, if any, are no longer decided about here."""
        self.subject = None
        self._phase = _Phase.WATCHING
        self._pays = False
        self._before.clear()
        self._after.clear()

    # decisions

    @property
    def measurement(self) -> Measurement | None:
        """Effect of merging on a step; None while no bucket has enough samples."""
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
        """The next action, or None. `Move.LEAVE` is repeated until `ended` is called."""
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
        """Makes the adapter with most rows the subject; a new subject discards the timings."""
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
        # An adapter not tried for long starts from the first backoff, so this table stays small.
        longest = self.policy.longest_backoff
        self._failures = {d: f for d, f in self._failures.items() if now < f[1] + longest}


def _bucket(rows: int, tokens: int) -> Bucket:
    return round(2 * math.log2(rows)), round(2 * math.log2(max(tokens, 1)))
