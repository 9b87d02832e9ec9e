"""A step's prompt tokens are limited by what recent steps have cost."""

from __future__ import annotations

import pytest
from engine.driving import Engine
from engine.oracle import OracleRunner, continuation
from engine.simulation import Arrival, Costs, Simulation, steadily
from loraplex_server.engine.batching.step_costs import FLOOR, PROBE_EVERY, StepCosts


def decoding(ratio: float, costs: Costs | None = None) -> Simulation:
    """Eight rows that decode, and then four long prompts."""
    simulation = Simulation(costs, prompt_step_ratio=ratio)
    for _ in range(8):
        simulation.arrive(Arrival(0.0, new=6000))
    while [each[:2] for each in simulation.passes[-9:]] != [(8, 0)] * 9:
        simulation.simulate([], until=simulation.now + 0.001)
    simulation.passes.clear()
    for _ in range(4):
        simulation.arrive(Arrival(simulation.now, prompt=2000, new=1))
    return simulation


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_while_rows_decode_a_step_takes_no_longer_than_the_ratio_says(ratio: float) -> None:
    simulation = decoding(ratio)
    simulation.simulate([], until=simulation.now + 10.0)
    longest = max(seconds for _, _, seconds in simulation.passes)
    alone = simulation.costs.seconds(9, 0)
    # An eighth for what the averages do not know yet, and for rounding to whole tokens.
    assert 0.8 * ratio * alone < longest < 1.125 * ratio * alone
    assert all(course.outcome == "length" for id, course in simulation.courses.items() if id > 8)


def test_without_a_ratio_or_without_rows_that_decode_a_prompt_has_the_whole_budget() -> None:
    free = decoding(0.0)
    free.simulate([], until=free.now + 2.0)
    assert max(tokens for _, tokens, _ in free.passes) == 512 - 8
    alone = Simulation()
    alone.arrive(Arrival(0.0, prompt=1024, new=4))
    alone.simulate([])
    later = alone.arrive(Arrival(alone.now, prompt=1024, new=4))
    alone.passes.clear()
    alone.simulate([])
    assert [tokens for _, tokens, _ in alone.passes if tokens] == [512, 512]
    assert alone.courses[later].outcome == "length"


def test_a_prompt_progresses_however_slow_prompts_are() -> None:
    simulation = decoding(1.001, Costs(token=0.01))
    simulation.simulate([], until=simulation.now + 30.0)
    steps = [tokens for _, tokens, _ in simulation.passes]
    assert {FLOOR} <= set(steps) <= {0, FLOOR}
    assert steps.count(0) <= len(steps) / PROBE_EVERY + 1


def test_the_limit_follows_a_machine_that_becomes_slower_and_faster_again() -> None:
    """Under prompts without end, only the steps without any tell what decoding alone takes."""
    simulation = decoding(2.0)
    load = steadily(8, 60, account="", prompt=1000, new=1)
    for slowness, until in [(1.0, 12.0), (4.0, 36.0), (1.0, 48.0)]:
        simulation.costs = Costs(slowness=slowness)
        coming = [each for each in load if simulation.now <= each.at < until]
        simulation.simulate(coming, until=until)
        rows, tokens, seconds = simulation.passes[-2]
        if not tokens:
            rows, tokens, seconds = simulation.passes[-3]
        alone = simulation.costs.seconds(rows, 0)
        assert 1.6 * alone < seconds < 2.3 * alone, slowness


def test_a_pause_of_the_machine_is_not_taken_for_a_cost() -> None:
    costs = StepCosts(2.0)
    for _ in range(20):
        costs.note(8, 0, 0.01)
        costs.note(8, 40, 0.02)
    before = costs.allowance(8, 512)
    costs.note(8, 40, 5.0)
    assert costs.allowance(8, 512) > before / 2


def test_steps_to_come_are_measured_by_those_of_now_though_a_rare_one_paused() -> None:
    costs = StepCosts(2.0)
    assert costs.expected() == (0.0, 0.0)
    for _ in range(40):
        costs.note(8, 100, 0.02)  # with prompts, before any step without
    assert costs.expected() == (pytest.approx(0.02), 0.0)
    costs.note(8, 0, 0.01)
    costs.note(8, 100, 0.02)
    assert sum(costs.expected()) <= 0.02
    costs.note(64, 0, 5.0)  # a pause of the machine, when so many rows are new
    for _ in range(400):
        costs.note(8, 100, 0.02)
    base, slope = costs.expected()
    assert base + 8 * slope == pytest.approx(0.02, rel=0.05)
    assert base + 64 * slope < 2.1 * 8 * 0.02  # twice what the proportion gives


@pytest.mark.parametrize("ratio", [0.0, 1.2, 4.0])
def test_how_prompts_are_cut_changes_no_token(ratio: float) -> None:
    engine = Engine(OracleRunner(num_blocks=400), prompt_step_ratio=ratio)
    forward = engine.runner.forward

    def timed(batch: object) -> object:
        engine.clock.now += 0.001 + 0.0001 * len(batch.tokens)  # type: ignore[attr-defined]
        return forward(batch)  # type: ignore[arg-type]

    engine.runner.forward = timed  # type: ignore[assignment, method-assign]
    prompts = {id: [id + i % 9 for i in range(60)] for id in range(1, 6)}
    for id, prompt in prompts.items():
        engine.submit(id, prompt, 12)
        engine.step()
        engine.step()
    engine.run()
    for id, prompt in prompts.items():
        assert engine.tokens(id) == continuation(prompt, [], 12)
