"""When the engine merges by itself: only what dominates, only if it was measured to pay."""

from __future__ import annotations

import pytest
from loraplex_server.engine.adapters.auto_merge import AutoMerge, Decision, MergePolicy, Move

POLICY = MergePolicy(window=10, samples=4, warmup=2, trial=40, backoff=30.0, longest_backoff=100.0)


class Traffic:
    """Steps of 10 rows, of which `share` use adapter "a"; a pass takes as long as one is told."""

    def __init__(self, policy: MergePolicy = POLICY) -> None:
        self.auto = AutoMerge(policy)
        self.now = 0.0

    def run(
        self,
        steps: int,
        seconds: float,
        share: float = 0.8,
        tokens: int = 10,
        quiet: bool = True,
    ) -> Decision | None:
        """Steps until something is decided, at most `steps`."""
        for _ in range(steps):
            self.now += 1.0
            rows = {"a": int(10 * share), "b": 10 - int(10 * share)}
            self.auto.observe(rows, 10, tokens, seconds, quiet)
            decision = self.auto.decide(self.now)
            if decision is not None:
                return decision
        return None

    def try_it(self) -> None:
        decision = self.run(50, 1.0)
        assert decision == Decision(Move.TRY, "a")
        self.auto.merged()


def test_a_dominating_adapter_is_tried_only_after_a_whole_window() -> None:
    traffic = Traffic()
    assert traffic.run(9, 1.0) is None
    assert traffic.run(1, 1.0) == Decision(Move.TRY, "a")


def test_one_that_does_not_dominate_is_not_tried() -> None:
    assert Traffic().run(100, 1.0, share=0.5) is None


def test_what_pays_stays_and_shows_its_measurement() -> None:
    traffic = Traffic()
    traffic.try_it()
    decision = traffic.run(20, 0.8)
    assert decision is not None
    assert decision.kind is Move.KEEP
    assert decision.measurement is not None
    assert (decision.measurement.unmerged, decision.measurement.merged) == (1.0, 0.8)
    assert traffic.run(100, 0.8) is None


@pytest.mark.parametrize("merged", [0.97, 1.0, 1.5])
def test_what_does_not_pay_by_the_margin_is_taken_back(merged: float) -> None:
    traffic = Traffic()
    traffic.try_it()
    decision = traffic.run(20, merged)
    assert decision is not None
    assert decision.kind is Move.LEAVE
    assert decision.measurement is not None
    assert decision.measurement.merged == merged


def test_the_first_merged_steps_are_not_timed() -> None:
    traffic = Traffic()
    traffic.try_it()
    assert traffic.run(POLICY.warmup, 50.0) is None
    decision = traffic.run(20, 0.5)
    assert decision is not None
    assert decision.kind is Move.KEEP


def test_only_like_steps_are_compared() -> None:
    traffic = Traffic()
    traffic.try_it()
    assert traffic.run(20, 0.1, tokens=500) is None
    decision = traffic.run(20, 1.0)
    assert decision is not None
    assert decision.kind is Move.LEAVE


def test_steps_beside_other_work_are_not_timed() -> None:
    traffic = Traffic()
    traffic.try_it()
    assert traffic.run(20, 0.1, quiet=False) is None
    decision = traffic.run(20, 1.0)
    assert decision is not None
    assert decision.kind is Move.LEAVE


def test_a_try_that_cannot_be_measured_ends() -> None:
    traffic = Traffic()
    traffic.try_it()
    decision = traffic.run(POLICY.trial, 0.1, tokens=500)
    assert decision == Decision(Move.LEAVE, "a")


def test_it_leaves_below_the_lower_threshold_and_not_above() -> None:
    traffic = Traffic()
    traffic.try_it()
    traffic.run(20, 0.8)
    assert traffic.run(100, 0.8, share=0.4) is None
    decision = traffic.run(10, 0.8, share=0.1)
    assert decision is not None
    assert decision.kind is Move.LEAVE


def test_it_leaves_when_the_measurement_turns() -> None:
    traffic = Traffic()
    traffic.try_it()
    traffic.run(20, 0.8)
    decision = traffic.run(200, 1.2)
    assert decision is not None
    assert decision.kind is Move.LEAVE


def test_a_failed_try_is_repeated_after_ever_longer_times() -> None:
    traffic = Traffic()
    waits: list[float] = []
    for _ in range(4):
        traffic.try_it()
        traffic.run(20, 2.0)
        traffic.auto.ended(traffic.now)
        ended = traffic.now
        while traffic.run(1, 1.0) is None:
            pass
        waits.append(traffic.now - ended)
        traffic.auto.ended(traffic.now)  # it could not even begin this time
        traffic.now += 200.0
    assert waits[0] == pytest.approx(POLICY.backoff, abs=1.0)
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(POLICY.longest_backoff, abs=1.0)


def test_after_a_merge_that_paid_the_next_try_waits_once() -> None:
    traffic = Traffic()
    for _ in range(3):
        traffic.try_it()
        traffic.run(20, 0.5)
        traffic.run(20, 0.5, share=0.1)
        traffic.auto.ended(traffic.now)
        ended = traffic.now
        while traffic.run(1, 1.0) is None:
            pass
        assert traffic.now - ended <= POLICY.backoff + 1.0
        traffic.auto.reset()
        traffic.now += POLICY.backoff


def test_thresholds_without_hysteresis_are_refused() -> None:
    with pytest.raises(ValueError, match="lower"):
        MergePolicy(upper=0.6, lower=0.6)
    with pytest.raises(ValueError, match="half"):
        MergePolicy(upper=0.4, lower=0.1)
