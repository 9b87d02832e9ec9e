"""An engine in virtual time: each pass takes the time that a machine's costs say, none computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from engine.driving import Engine
from engine.oracle import OracleRunner
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.messages import StepReport


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a pass: `step + row * decode rows + token * prompt tokens`, times `slowness`."""

    step: float = 0.004
    row: float = 0.0003
    token: float = 0.0002
    slowness: float = 1.0

    def seconds(self, rows: int, tokens: int) -> float:
        return (self.step + self.row * rows + self.token * tokens) * self.slowness


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives at `at` seconds from the start.

    Its prompt is `tokens`, or of `prompt` tokens that no other one near it begins with.
    """

    at: float
    account: str = ""
    prompt: int = 128
    new: int = 64
    patience: float | None = None
    tokens: tuple[int, ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()


@dataclass(slots=True)
class Course:
    """What happened to a request. Times are seconds from the start; None if not yet.

    Attributes:
        tokens: times of its tokens.
    """

    asked: Arrival
    tokens: list[float]
    ended: float | None = None
    outcome: str | None = None

    @property
    def first_token(self) -> float:
        """Seconds from its arrival to its first token."""
        return self.tokens[0] - self.asked.at


class Simulation(Engine):
    """An engine whose passes only take time.

    Attributes:
        passes: decode rows, prompt tokens and seconds of each pass.
    """

    def __init__(
        self, costs: Costs | None = None, runner: OracleRunner | None = None, **limits: Any
    ) -> None:
        runner = runner or OracleRunner(num_blocks=4000, block_size=16, max_context=8192)
        super().__init__(runner, **limits)
        self.runner.forward = self._pass  # type: ignore[method-assign]
        self.costs = costs or Costs()
        self.started_at = self.clock.now
        self.passes: list[tuple[int, int, float]] = []
        self.courses: dict[int, Course] = {}

    @property
    def now(self) -> float:
        return self.clock.now - self.started_at

    def arrive(self, arrival: Arrival) -> int:
        """Submits a request that arrives now or has arrived during the last pass."""
        id = len(self.courses) + 1
        self.courses[id] = Course(arrival, [])
        deadline = None
        if arrival.patience is not None:
            deadline = self.started_at + arrival.at + arrival.patience
        prompt = [*arrival.tokens] or [1 + (id + i) % 400 for i in range(arrival.prompt)]
        fields = dict(arrival.fields)
        self.submit(id, prompt, arrival.new, account=arrival.account, deadline=deadline, **fields)
        return id

    def simulate(self, arrivals: Iterable[Arrival], until: float = float("inf")) -> None:
        """Lets requests arrive, in the order of time, until the time or until all have ended."""
        coming = sorted(arrivals, key=lambda each: each.at)
        while self.now < until - 1e-9:
            while coming and coming[0].at <= self.now + 1e-9:  # times are rounded
                self.arrive(coming.pop(0))
            self._note(self.core.take_refusals())
            if not self.core.idle:
                while self.loader.jobs:
                    self.loader.finish()
                before = self.now
                self._note(self.step())
                if self.now == before:  # nothing could be computed
                    self.clock.now += 0.001
            elif coming:
                self.clock.now = self.started_at + min(coming[0].at, until)
            else:
                return

    def work(self, account: str, begin: float, end: float) -> int:
        """Number of tokens that were generated for an account in a span of time."""
        return sum(
            begin <= at < end
            for course in self.courses.values()
            if course.asked.account == account
            for at in course.tokens
        )

    def _note(self, report: StepReport | None) -> None:
        for output in report.outputs if report is not None else ():
            course = self.courses[output.id]
            course.tokens += [self.now] * len(output.token_ids)
            if output.finish is not None or output.error is not None:
                course.ended = self.now
                course.outcome = output.finish or (output.error and output.error.reason)

    def _pass(self, batch: ForwardBatch) -> np.ndarray:
        counts = np.diff(batch.query_starts)
        rows = int((counts == 1).sum())
        tokens = int(counts.sum()) - rows
        seconds = self.costs.seconds(rows, tokens)
        self.passes.append((rows, tokens, seconds))
        self.clock.now += seconds
        return np.zeros((len(batch.logit_rows), self.runner.vocab_size), np.float32)


def steadily(rate: float, seconds: float, start: float = 0.0, **fields: Any) -> list[Arrival]:
    """Arrivals at equal distances."""
    count = int(rate * seconds)
    return [Arrival(start + i / rate, **fields) for i in range(count)]


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
