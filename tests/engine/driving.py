"""Driving an `EngineCore` by hand: a clock that is set, a loader that is told when it has read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, cast

from engine.ahead_oracle import AheadOracle
from engine.oracle import OracleRunner
from loraplex_server.engine.adapters.loader import LoaderResult, LoaderTask, Read, execute
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    ControlDone,
    LoadDone,
    MergeDone,
    Output,
    SamplingParams,
    StepReport,
    Submit,
)
from loraplex_server.engine.runner.protocol import ModelRunner

GREEDY = SamplingParams(temperature=0.0)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ManualLoader:
    """A loader whose tasks end when a test calls `finish`.

    Attributes:
        jobs: tasks that are being done; at most `lanes`, and at most `lanes - 1` merges.
        started: digests of the reads, in the order in which they were begun.
    """

    def __init__(self, runner: OracleRunner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._results: list[LoaderResult] = []
        self.lanes = 2
        self.jobs: list[LoaderTask] = []
        self.started: list[str] = []

    @property
    def reading(self) -> AdapterRef | None:
        """The oldest job's adapter."""
        return self.jobs[0].ref if self.jobs else None

    def start(self, task: LoaderTask) -> None:
        self.jobs.append(task)
        assert len(self.jobs) + len(self._results) <= self.lanes, "more jobs than lanes"
        if isinstance(task, Read):
            self.started.append(task.ref.digest)

    def finish(self, at: int = 0, seconds: float = 0.0) -> None:
        """Ends a job, which has taken `seconds`."""
        result = execute(self._runner, self.jobs.pop(at), self._clock)
        self._results.append(dataclasses.replace(result, seconds=seconds))

    def poll(self) -> LoaderResult | None:
        return self._results.pop(0) if self._results else None


class Engine:
    """A core over an oracle, and everything that came out of it.

    Attributes:
        is_ahead: whether engines launch one pass ahead; see the fixture `pace`.
        device: the oracle as the core drives it, if it launches ahead.
    """

    is_ahead: ClassVar[bool] = False

    def __init__(self, runner: OracleRunner | None = None, **limits: int) -> None:
        self.runner = runner or OracleRunner()
        self.runner.keep_batches = True
        self.device = AheadOracle(self.runner)
        self.clock = Clock()
        self.loader = ManualLoader(self.runner, self.clock)
        driven = cast(ModelRunner, self.device if self.is_ahead else self.runner)
        self.core = EngineCore(driven, EngineLimits(**limits), self.clock, self.loader)
        self.outputs: dict[int, list[Output]] = {}
        self.controls: dict[int, ControlDone] = {}
        self.loads: list[LoadDone] = []
        self.merges: list[MergeDone] = []
        self.last: StepReport | None = None

    def submit(self, id: int, token_ids: list[int], max_new_tokens: int = 4, **fields: Any) -> None:
        fields.setdefault("sampling", GREEDY)
        self.core.add(Submit(id, token_ids, max_new_tokens, **fields))

    def step(self) -> StepReport | None:
        done = None
        for message in self.core.step():
            if isinstance(message, StepReport):
                done = self.last = message
                for output in message.outputs:
                    self.outputs.setdefault(output.id, []).append(output)
            elif isinstance(message, LoadDone):
                self.loads.append(message)
            elif isinstance(message, MergeDone):
                self.merges.append(message)
            else:
                assert message.op not in self.controls, "a control order is answered twice"
                self.controls[message.op] = message
        return done

    def run(self, most: int = 1000) -> None:
        """Steps, and ends every job at once, until nobody waits; waiting for ever fails."""
        for _ in range(most):
            if self.core.idle:
                return
            while self.loader.jobs:
                self.loader.finish()
            self.step()
        raise AssertionError(f"somebody still waits after {most} steps")

    def tokens(self, id: int) -> list[int]:
        return [token for output in self.outputs.get(id, []) for token in output.token_ids]

    def outcome(self, id: int) -> str | None:
        """ "stop", "length", an error's reason, or None while there is none."""
        ends = [o for o in self.outputs.get(id, []) if o.finish is not None or o.error is not None]
        assert len(ends) <= 1, f"request {id} ended twice"
        if not ends:
            return None
        assert ends[0] is self.outputs[id][-1], f"request {id} had output after its end"
        return ends[0].finish or (ends[0].error.reason if ends[0].error else None)


def adapter(name: str, weight: float = 1.0, **options: Any) -> AdapterRef:
    """A reference to an oracle adapter; see `oracle` for the options."""
    return AdapterRef(f"sha256:{name}", json.dumps(options), weight)


class AheadEngine(Engine):
    """An engine that launches one pass ahead, whatever the fixture `pace` says."""

    is_ahead = True
