"""Deadlines end requests in time, and are forgotten with them."""

from __future__ import annotations

import random

import pytest
from engine.driving import Engine
from engine.oracle import OracleRunner
from loraplex_server.engine.batching.deadlines import Deadlines


@pytest.mark.fault("deadlines-kept")
def test_deadlines_of_finished_requests_are_forgotten_under_steady_load() -> None:
    """Checked while a request is running; an idle engine has always forgotten them."""
    engine = Engine(OracleRunner(num_blocks=600), max_running=4)
    engine.submit(0, [1], 1023, deadline=engine.clock.now + 3600)
    engine.step()
    most = 0
    for id in range(1, 1000):
        engine.submit(id, [2], 1, deadline=engine.clock.now + 600)
        engine.step()
        assert engine.outcome(id) == "length"
        most = max(most, len(engine.core._deadlines))
    assert engine.outcome(0) is None, "the engine was to be measured while it runs a request"
    assert most <= 100


def test_deadlines_pass_in_their_order_whatever_is_removed() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    deadlines, kept, now = Deadlines(), dict[int, float](), 0.0
    for id in range(3000):
        kept[id] = now + rng.choice([1.0, 5.0, 500.0])
        deadlines.add(id, kept[id])
        for _ in range(rng.choice([0, 1, 1, 2])):
            if kept:
                gone = rng.choice(list(kept))
                del kept[gone]
                deadlines.remove(gone)
        now += rng.choice([0.0, 0.01, 0.1])
        expected = sorted(deadline for deadline in kept.values() if deadline <= now)
        assert [kept.pop(id) for id in deadlines.passed(now)] == expected
        assert deadlines.next == min(kept.values(), default=None)
        assert len(deadlines) <= max(2 * len(kept), 64)
