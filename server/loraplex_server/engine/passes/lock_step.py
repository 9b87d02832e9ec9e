"""One pass after the other: each is computed, read and answered before the next is scheduled."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final, Protocol

import numpy as np
from loraplex_model.base.batch import ForwardBatch

from loraplex_server.engine.batching.sampler import Floats
from loraplex_server.engine.batching.scheduler import BatchRow, Scheduler
from loraplex_server.engine.passes.answers import Answers, OnFault, ReadPass
from loraplex_server.engine.passes.start import start
from loraplex_server.engine.passes.tally import PassTally
from loraplex_server.engine.runner.protocol import ModelRunner

FAILED = "a forward pass failed; its %d requests fail"

_NO_STATES: Final = np.empty((0, 0), np.float32)


class Passes(Protocol):
    """The passes of an engine, in order."""

    @property
    def in_flight(self) -> bool:
        """Whether a pass has been started and not been read."""

    def run(self, now: float) -> ReadPass:
        """Starts the next pass, if there are rows for it, and reads one that has been started."""

    def settle_slot(self, slot: int) -> None:
        """Returns when no pass that has been started reads the weights of `slot` any more."""


class LockStep:
    """`Passes` over a runner that computes a pass when it is called."""

    in_flight = False

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        answers: Answers,
        tally: PassTally,
        on_fault: OnFault,
        meanwhile: AbstractContextManager[object],
    ) -> None:
        """`meanwhile` is entered while the runner computes: nothing here is used then."""
        self._runner = runner
        self._scheduler = scheduler
        self._answers = answers
        self._tally = tally
        self._on_fault = on_fault
        self._meanwhile = meanwhile

    def run(self, now: float) -> ReadPass:
        """Computes and answers one pass. If it fails, its requests end."""
        started = start(self._scheduler, self._tally, now, self._forward)
        if started.result is not None:
            self._tally.faults = 0
            for row in started.rows:
                self._scheduler.settle(row)
            self._answers.commit(started.rows, *started.result)
        elif started.error is not None:
            requests = [row.request for row in started.rows]
            self._on_fault(requests, FAILED, started.error)
        return ReadPass(started.rows, now)

    def settle_slot(self, slot: int) -> None:
        """Nothing reads a slot between two steps."""

    def _forward(self, rows: list[BatchRow], batch: ForwardBatch) -> tuple[Floats, Floats]:
        """Logits, and the states of the rows that want some."""
        self._answers.refill_masks()
        if not len(batch.state_rows):
            with self._meanwhile:
                return np.asarray(self._runner.forward(batch)), _NO_STATES
        width = self._runner.info.base.config.hidden_size
        states = np.empty((len(batch.state_rows), width), np.float32)
        with self._meanwhile:
            return np.asarray(self._runner.forward(batch, states)), states
