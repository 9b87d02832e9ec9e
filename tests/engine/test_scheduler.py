"""The policies of the scheduler, seen through what the model is asked to compute."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from engine.driving import GREEDY, Engine, adapter
from engine.oracle import OracleRunner, continuation
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.batching.scheduler import Scheduler
from loraplex_server.engine.messages import Submit

pytestmark = pytest.mark.usefixtures("pace")


def counts(engine: Engine) -> list[int]:
    """Tokens per sequence of the last pass."""
    return np.diff(engine.runner.batches[-1].query_starts).tolist()


@pytest.mark.lock_step
def test_decode_rows_go_first_and_prompts_share_the_rest_of_the_budget() -> None:
    engine = Engine(OracleRunner(num_blocks=100), token_budget=10, max_running=8)
    engine.submit(1, [1] * 3, 20)
    engine.submit(2, [2] * 3, 20)
    engine.step()
    assert counts(engine) == [3, 3]
    engine.submit(3, [3] * 12, 20)
    engine.submit(4, [4] * 12, 20)
    engine.step()
    assert counts(engine) == [1, 1, 8]
    engine.step()
    assert counts(engine) == [1, 1, 4, 4]
    engine.step()
    assert counts(engine) == [1, 1, 1, 7]
    engine.step()
    assert sorted(counts(engine)) == [1, 1, 1, 1]


@pytest.mark.lock_step
def test_logits_are_asked_for_only_where_a_token_is_due() -> None:
    engine = Engine(token_budget=4, max_running=4)
    engine.submit(1, [1] * 10, 3)
    engine.step()
    engine.step()
    assert len(engine.runner.batches[-1].logit_rows) == 0
    engine.step()
    assert engine.runner.batches[-1].logit_rows.tolist() == [1]


def test_a_chunked_prompt_gives_the_same_tokens() -> None:
    prompt = list(range(50))
    for budget in (1, 3, 7, 64):
        engine = Engine(token_budget=budget, max_running=1)
        engine.submit(1, prompt, 6)
        engine.run()
        assert engine.tokens(1) == continuation(prompt, [], 6)


def test_a_higher_priority_starts_first_and_equal_ones_in_order_of_arrival() -> None:
    engine = Engine(token_budget=64, max_running=1)
    for id, priority in [(1, 0), (2, 0), (3, 5), (4, 5), (5, -1)]:
        engine.submit(id, [id], 1, priority=priority)
    order: list[int] = []
    while not engine.core.idle:
        done = engine.step()
        order += [output.id for output in done.outputs] if done else []
    assert order == [3, 4, 1, 2, 5]


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    engine = Engine(OracleRunner(num_blocks=8, block_size=4), token_budget=64, max_running=8)
    engine.submit(1, [1] * 16, 4)
    engine.step()
    engine.submit(2, [2] * 20, 4)
    engine.submit(3, [3], 4)
    engine.step()
    assert engine.tokens(3) == []
    engine.run()
    assert engine.tokens(2) == continuation([2] * 20, [], 4)


def test_preemption_takes_the_last_in_order_and_repeats_no_output() -> None:
    runner = OracleRunner(num_blocks=6, block_size=2)
    engine = Engine(runner, token_budget=64, max_running=4)
    engine.submit(1, [1, 1], 10, priority=1)
    engine.submit(2, [2, 2], 10)
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions >= 1
    for id in (1, 2):
        assert engine.tokens(id) == continuation([id, id], [], 10)
        assert sum(output.started for output in engine.outputs[id]) == 1
    ends = [len(engine.outputs[id]) for id in (1, 2)]
    assert ends == [10, 10]


@pytest.mark.lock_step
def test_the_first_in_order_is_never_put_back() -> None:
    engine = Engine(OracleRunner(num_blocks=6, block_size=2), token_budget=64, max_running=4)
    engine.submit(1, [1, 1], 10)
    engine.submit(2, [2, 2], 10)
    steps = 0
    while engine.outcome(1) is None:
        engine.step()
        steps += 1
    assert steps == 10


def test_rows_with_an_equal_mix_lie_side_by_side() -> None:
    engine = Engine(OracleRunner(num_blocks=100, adapter_budget_bytes=10), token_budget=64)
    mixes = [[], ["a"], ["b"], ["a", "b"]]
    for id in range(16):
        refs = [adapter(name) for name in mixes[id % 4]]
        engine.submit(id, [id], 50, adapters=refs)
    for _ in range(4):
        if engine.loader.reading is not None:
            engine.loader.finish()
        engine.step()
    batch = engine.runner.batches[-1]
    assert len(batch.context_lens) == 16
    rows = [
        tuple(batch.mix_slots[batch.mix_starts[s] : batch.mix_starts[s + 1]]) for s in range(16)
    ]
    changes = sum(rows[s] != rows[s - 1] for s in range(1, 16))
    assert changes == 3


def test_a_request_that_can_never_fit_is_refused_by_name() -> None:
    engine = Engine(OracleRunner(num_blocks=4, block_size=4))
    engine.submit(1, [1] * 10, 7)
    engine.submit(2, [1] * 10, 8)
    engine.run()
    assert engine.outcome(1) == "length"
    assert engine.outcome(2) == "PROMPT_TOO_LONG"


def test_a_request_whose_next_token_is_being_chosen_is_not_started_before_it_is_known() -> None:
    scheduler = Scheduler(BlockPool(8, 4), EngineLimits())
    submit = Submit(1, [1, 2], 4, sampling=GREEDY)
    request = Request(submit, (0.0, 1), 0.0, Draw(submit.sampling, submit.token_ids))
    request.awaits_token = True  # as after a preemption
    scheduler.enqueue(request)
    assert scheduler.schedule(0.0) == []
    request.awaits_token = False
    assert [row.request for row in scheduler.schedule(0.0)] == [request]


@pytest.mark.parametrize("limits", [{"max_running": 9, "token_budget": 8}, {"max_waiting": 0}])
def test_limits_that_cannot_work_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        EngineLimits(**limits)


@pytest.mark.lock_step
def test_scheduler_requests_and_blocks_need_neither_torch_nor_numpy_nor_grpc() -> None:
    code = (
        "import sys\n"
        "from loraplex_server.engine import messages\n"
        "from loraplex_server.engine.batching import kv, request, scheduler\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
