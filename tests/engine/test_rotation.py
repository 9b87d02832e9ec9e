"""When more adapters are wanted than fit on the device, each gets its turn within a bound."""

from __future__ import annotations

import itertools

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation
from engine.simulation import Arrival, Costs, Simulation
from loraplex_server.engine.messages import Load, Unload

TURN = 2.0
STEP = 0.1
"""Duration of a step on the test's clock."""


def rotating(slots: int, **limits: float) -> Simulation:
    # Enough blocks that no request waits for memory, which a turn does not give.
    runner = OracleRunner(
        num_blocks=40000, num_slots=slots, adapter_budget_bytes=1000, max_context=8192
    )
    costs = Costs(token=0.0)  # computing tokens again, which takes its time, is not what is tested
    return Simulation(costs, runner, **{"adapter_turn": TURN, **limits})


def asking(name: str, new: int, at: float = 0.0) -> Arrival:
    return Arrival(at, name, prompt=8, new=new, fields=(("adapters", [adapter(name)]),))


@pytest.mark.parametrize(("slots", "adapters"), [(1, 3), (2, 4), (3, 7), (4, 8)])
def test_every_adapter_comes_to_the_device_within_its_turns(slots: int, adapters: int) -> None:
    """Answers take far longer than a turn, and requests for the first adapters keep coming."""
    simulation = rotating(slots)
    names = [f"adapter-{i}" for i in range(adapters)]
    arrivals = [asking(name, 5000, at=i * 0.001) for i, name in enumerate(names)]
    arrivals += [asking(name, 5000, at) for name in names[:slots] for at in (0.5, 1.0, 2.5, 4.0)]
    simulation.simulate(arrivals, until=40.0)
    rounds = -(-adapters // slots)
    for id, name in enumerate(names, 1):
        tokens = simulation.courses[id].tokens
        assert tokens, f"{name} was never on the device"
        assert simulation.courses[id].first_token <= (rounds - 1) * (1.25 * TURN + 0.2)
        gaps = [after - before for before, after in itertools.pairwise(tokens)]
        # Each set-back request is the newest want then, so it waits for the others' turns.
        assert max(gaps) <= (rounds - 1) * (1.25 * TURN + 0.2)
        # Between two set-backs it runs for a turn: loads are a small part of the time.
        assert sum(gap < STEP for gap in gaps) > 0.9 * len(gaps)
    assert simulation.last is not None
    assert simulation.last.stats.set_back > 0


def test_without_a_limit_or_without_anyone_who_waits_requests_run_to_their_end() -> None:
    for turn, others in [(0.0, True), (TURN, False)]:
        simulation = rotating(1, adapter_turn=turn)
        simulation.simulate([asking("a", 2000), *([asking("b", 4, 0.5)] if others else [])])
        assert {course.outcome for course in simulation.courses.values()} == {"length"}
        assert simulation.last is not None
        assert simulation.last.stats.set_back == 0
        assert simulation.core.adapters.slots.evictions == others


@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": 1}, {"logprobs": 1}])
def test_who_is_set_back_goes_on_with_the_same_tokens(fields: dict[str, int]) -> None:
    engine = Engine(OracleRunner(num_blocks=200, num_slots=1), adapter_turn=1)
    first, second = adapter("a", invocation=[9, 10]), adapter("b", virtual=0)
    prompts = {1: [3, 9, 10, 4, 5], 2: [6, 7, 8]}
    engine.submit(1, prompts[1], 40, adapters=[first], **fields)
    engine.submit(2, prompts[2], 40, adapters=[second], **fields)
    for _ in range(2000):
        if engine.core.idle:
            break
        while engine.loader.jobs:
            engine.loader.finish()
        engine.step()
        engine.core.check_books()
        engine.clock.now += STEP
    engine.core.check()
    assert engine.last is not None
    assert engine.last.stats.set_back >= 2
    assert engine.tokens(1) == continuation(prompts[1], [("sha256:a", 1.0)], 40, active=1)
    assert engine.tokens(2) == continuation(prompts[2], [("sha256:b", 1.0)], 40)
    for id in (1, 2):
        scored = [entry.token_id for entry in engine.outputs[id][0].prompt_logprobs]
        assert scored == (prompts[id][1:] if "prompt_logprobs" in fields else [])
        assert sum(output.started for output in engine.outputs[id]) == 1


def test_requests_of_an_adapter_that_drains_by_order_are_not_set_back() -> None:
    """Its files may be gone, so it could not be loaded again; another one makes room instead."""
    simulation = rotating(2)
    simulation.simulate([asking("a", 3000), asking("b", 3000)], until=1.0)
    simulation.core.control(Unload(1, "sha256:a"))
    simulation.simulate([asking("c", 10, 1.0)], until=1.0 + 2 * TURN)
    assert simulation.courses[3].outcome == "length"
    gaps = [after - before for before, after in _pairs(simulation.courses[1].tokens)]
    assert max(gaps) < 1.0
    assert simulation.last is not None
    assert simulation.last.stats.set_back == 1


def test_an_order_to_load_gets_its_place_too() -> None:
    simulation = rotating(1)
    simulation.simulate([asking("a", 3000)], until=0.5)
    simulation.core.control(Load(1, adapter("b")))
    simulation.simulate([], until=0.5 + TURN + 1.0)
    assert simulation.controls[1].error is None


def _pairs(times: list[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(times))
