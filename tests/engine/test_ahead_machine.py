"""The state machine of `test_machine` over an engine that launches one pass ahead."""

from __future__ import annotations

from typing import Any

import pytest
from engine.ahead_oracle import AheadTicket
from engine.driving import AheadEngine
from engine.test_machine import EngineMachine
from hypothesis import settings
from hypothesis.stateful import rule
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.runner.protocol import StepResult


class AheadMachine(EngineMachine):
    """The oracle computes as late as it may, and notices what a launch still uses."""

    engine_class = AheadEngine

    def note_who_meets_a_fault(self) -> None:
        """As in the base class; who takes part in a launch is known when it is launched."""
        device = self.engine.device
        launch = device.launch

        def noting(batch: ForwardBatch, *rest: Any) -> AheadTicket:
            owners = self.owners(batch)
            try:
                ticket = launch(batch, *rest)
            except Exception as error:
                self.meet(error, owners)
                raise
            self.is_second_attempt = False
            wait = ticket.wait

            def waiting() -> StepResult:
                try:
                    return wait()
                except Exception:
                    for id in owners:
                        self.asked[id].met_fault = True
                    raise

            ticket.wait = waiting  # type: ignore[method-assign]
            return ticket

        device.launch = noting  # type: ignore[method-assign]

    @rule()
    def fail_the_next_launch(self) -> None:
        self.engine.device.failing_launches = 1

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.device.failing_launches = 0
        super().teardown()


AheadMachine.TestCase.settings = settings(EngineMachine.TestCase.settings, max_examples=100)
TestEveryRequestOfAnEngineThatWorksAheadEndsOnceWithTheRightTokens = AheadMachine.TestCase
for _name in ("memory-measured-idle", "right-weights-excused"):
    pytest.mark.fault(_name)(TestEveryRequestOfAnEngineThatWorksAheadEndsOnceWithTheRightTokens)
