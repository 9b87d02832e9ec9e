"""What a single request is promised: its tokens, one end, and nothing held afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from engine.driving import GREEDY, Engine, adapter
from engine.oracle import OracleRunner, continuation
from loraplex_server.engine.core import MAX_FAULTS, EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    Load,
    Merge,
    SamplingParams,
    StepReport,
    Submit,
)

pytestmark = pytest.mark.usefixtures("pace")


def test_a_stop_token_ends_the_request_and_is_not_returned() -> None:
    expected = continuation([1, 2], [], 6)
    engine = Engine()
    engine.submit(1, [1, 2], 6, stop_token_ids=[expected[3]], logprobs=0)
    engine.submit(2, [1, 2], 1, stop_token_ids=[expected[0]])
    engine.run()
    assert engine.tokens(1) == expected[:3]
    assert engine.outcome(1) == engine.outcome(2) == "stop"
    assert sum(len(output.logprobs) for output in engine.outputs[1]) == 3
    assert engine.tokens(2) == []


def test_the_first_output_and_no_other_says_started() -> None:
    engine = Engine()
    engine.clock.now = 10.0
    engine.submit(1, [1, 2], 3)
    engine.clock.now = 12.5
    engine.run()
    assert [output.started for output in engine.outputs[1]] == [True, False, False]
    assert [output.queue_seconds for output in engine.outputs[1]] == [2.5, 0.0, 0.0]


@pytest.mark.lock_step
def test_an_abort_is_final_within_a_step() -> None:
    engine = Engine()
    engine.submit(1, [1], 50)
    engine.submit(2, [2], 50, adapters=[adapter("a")])
    engine.submit(3, [512], 1)
    engine.step()
    outputs = len(engine.outputs[1])
    for id in (1, 2, 3, 99):
        engine.core.abort(id)
    engine.run()
    assert len(engine.outputs[1]) == outputs
    assert engine.outcome(2) is None
    engine.core.check()


def test_an_abort_takes_back_a_refusal_that_was_not_sent_yet() -> None:
    engine = Engine()
    engine.submit(1, [512], 1)
    engine.core.abort(1)
    engine.step()
    assert 1 not in engine.outputs


@pytest.mark.parametrize("where", ["running", "queued", "fetching"])
def test_a_deadline_is_honoured_within_a_step_wherever_the_request_is(where: str) -> None:
    engine = Engine(max_running=1)
    refs = [adapter("a")] if where == "fetching" else []
    if where == "queued":
        engine.submit(1, [1], 50)
    engine.submit(2, [2], 50, adapters=refs, deadline=engine.clock.now + 5)
    engine.step()
    assert engine.outcome(2) is None
    engine.clock.now += 5
    engine.step()
    assert engine.outcome(2) == "DEADLINE_EXCEEDED"
    engine.core.abort(1)
    engine.run()
    engine.core.check()


def test_the_engine_wakes_by_itself_for_a_deadline_and_for_nothing_else() -> None:
    engine = Engine()
    assert engine.core.wait_seconds() is None
    engine.submit(1, [1], 5, adapters=[adapter("a")], deadline=engine.clock.now + 5)
    assert engine.core.wait_seconds() == 0.0
    engine.step()
    assert engine.core.wait_seconds() == 5.0
    engine.core.abort(1)
    engine.step()
    assert engine.core.wait_seconds() is None
    engine.submit(2, [1], 5)
    engine.step()
    assert engine.core.wait_seconds() == 0.0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_ids": [1, 512]}, "FIELD_INVALID"),
        ({"token_ids": [1, -1]}, "FIELD_INVALID"),
        ({"token_ids": [1] * 200, "max_new_tokens": 100}, "PROMPT_TOO_LONG"),
        ({"token_ids": [1] * 20, "max_new_tokens": 2**31}, "PROMPT_TOO_LONG"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(
    fields: dict[str, object], reason: str
) -> None:
    engine = Engine()
    engine.core.add(Submit(**{"id": 1, "token_ids": [1], "max_new_tokens": 4, **fields}))
    engine.submit(2, [1], 4)
    engine.run()
    assert engine.outcome(1) == reason
    assert engine.outcome(2) == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": []},
        {"max_new_tokens": -1},
        {"sampling": SamplingParams(logit_bias={512: 1.0})},
    ],
)
def test_a_request_that_the_front_never_sends_is_a_fault_of_the_program(
    fields: dict[str, object],
) -> None:
    engine = Engine()
    with pytest.raises(AssertionError):
        engine.core.add(Submit(**{"id": 1, "token_ids": [1], "max_new_tokens": 4, **fields}))


def test_a_full_queue_refuses_and_the_accepted_are_served() -> None:
    engine = Engine(max_running=1, max_waiting=3)
    for id in range(1, 10):
        engine.submit(id, [id], 3)
    engine.run()
    assert [engine.outcome(id) for id in range(1, 10)] == ["length"] * 3 + ["OVERLOADED"] * 6


def test_waiting_prompt_tokens_are_bounded_but_a_lone_prompt_is_taken() -> None:
    engine = Engine(OracleRunner(num_blocks=100), max_waiting_tokens=50)
    engine.submit(1, [1] * 60, 1)
    engine.submit(2, [1], 1)
    engine.run()
    assert engine.outcome(1) == "length"
    assert engine.outcome(2) == "OVERLOADED"


def test_requests_waiting_for_adapters_count_as_waiting() -> None:
    engine = Engine(max_waiting=2)
    for id in (1, 2, 3):
        engine.submit(id, [id], 1, adapters=[adapter("a")])
    engine.run()
    assert [engine.outcome(id) for id in (1, 2, 3)] == ["length", "length", "OVERLOADED"]


def test_a_failed_pass_costs_its_rows_and_the_next_ones_are_served() -> None:
    engine = Engine(OracleRunner(fault_token=7), max_running=2)
    engine.submit(1, [1], 5)
    engine.submit(2, [7], 5)
    engine.submit(3, [3], 5)
    engine.run()
    assert engine.outcome(1) == engine.outcome(2) == "ENGINE_FAULT"
    assert engine.tokens(3) == continuation([3], [], 5)
    assert not engine.core.broken
    engine.core.check()
    assert all("secret" not in str(output) for output in engine.outputs[2])


@pytest.mark.lock_step
def test_an_engine_that_only_fails_says_that_it_is_broken() -> None:
    engine = Engine(OracleRunner(fault_token=7), max_running=1)
    for id in range(MAX_FAULTS):
        assert not engine.core.broken
        engine.submit(id, [7], 5)
        engine.step()
    assert engine.core.broken


def test_faults_with_successes_between_them_break_nothing() -> None:
    engine = Engine(OracleRunner(fault_token=7), max_running=1)
    for id in range(2 * MAX_FAULTS):
        engine.submit(id, [7] if id % 2 else [1], 1)
    engine.run()
    assert not engine.core.broken


def test_every_request_of_a_broken_engine_has_its_answer() -> None:
    engine = Engine(OracleRunner(fault_token=7), max_running=1)
    for id in range(MAX_FAULTS):
        engine.submit(id, [7], 5)
    engine.run()
    assert engine.core.broken
    assert all(engine.outcome(id) == "ENGINE_FAULT" for id in range(MAX_FAULTS))


def test_a_row_with_logits_that_are_not_finite_fails_alone() -> None:
    engine = Engine(OracleRunner(nonfinite_token=7))
    bad = adapter("nan", nonfinite=True)
    engine.submit(1, [1], 5)
    engine.submit(2, [7, 2], 5)
    engine.submit(3, [3], 5, adapters=[bad])
    engine.submit(4, [2, 7, 2], 5, prompt_logprobs=0)
    engine.run()
    assert engine.tokens(1) == continuation([1], [], 5)
    assert [engine.outcome(id) for id in (2, 3, 4)] == ["NON_FINITE_LOGITS"] * 3
    engine.core.check()


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("budget", [1, 2, 5, 512])
def test_prompt_logprobs_do_not_depend_on_how_the_prompt_is_cut(rows: int, budget: int) -> None:
    prompt = [5, 6, 7, 8, 9, 10, 11]
    engine = Engine(token_budget=budget, max_running=1, prompt_logprob_rows=rows)
    engine.submit(1, prompt, 2, prompt_logprobs=1, logprobs=1)
    engine.run()
    first, second = engine.outputs[1]
    assert [entry.token_id for entry in first.prompt_logprobs] == prompt[1:]
    tops = [entry.top[0][0] for entry in first.prompt_logprobs]
    assert tops == [continuation(prompt[:n], [], 1)[0] for n in range(1, 7)]
    assert second.prompt_logprobs == []
    assert [entry.token_id for entry in first.logprobs] == first.token_ids


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_prompt_logprobs_survive_preemption_once_each(rows: int) -> None:
    runner = OracleRunner(num_blocks=8, block_size=2)
    engine = Engine(runner, token_budget=4, max_running=4, prompt_logprob_rows=rows)
    engine.submit(1, [1, 1], 8, priority=1)
    prompt = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    engine.submit(2, prompt, 6, prompt_logprobs=0)
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions >= 1
    entries = engine.outputs[2][0].prompt_logprobs
    alone = Engine()
    alone.submit(2, prompt, 6, prompt_logprobs=0)
    alone.run()
    assert entries == alone.outputs[2][0].prompt_logprobs
    assert engine.tokens(2) == continuation(prompt, [], 6)


def test_sampled_tokens_depend_on_the_request_alone() -> None:
    sampling = SamplingParams(temperature=5.0, seed=11)
    alone = Engine()
    alone.submit(1, [4, 5], 12, sampling=sampling)
    alone.run()
    crowd = Engine(OracleRunner(num_blocks=14, block_size=4), token_budget=5, max_running=4)
    for id in range(2, 6):
        crowd.submit(id, [id] * 5, 9, sampling=GREEDY if id % 2 else SamplingParams(seed=id))
    crowd.submit(1, [4, 5], 12, sampling=sampling)
    crowd.run()
    assert crowd.tokens(1) == alone.tokens(1)
    assert alone.tokens(1) != continuation([4, 5], [], 12)


@pytest.mark.lock_step
def test_statistics_tell_what_the_step_did() -> None:
    engine = Engine(OracleRunner(num_blocks=20, block_size=4), token_budget=8, max_running=8)
    engine.core.control(Load(1, adapter("a", nbytes=9)))
    engine.step()
    engine.loader.finish()
    engine.submit(1, [1] * 3, 9, adapters=[adapter("a", nbytes=9)])
    engine.submit(2, [2] * 3, 9)
    engine.step()
    engine.submit(3, [3] * 40, 1)
    engine.submit(4, [4] * 20, 9)
    done = engine.step()
    assert done is not None
    stats = done.stats
    assert (stats.step, stats.decode_rows, stats.prefill_tokens) == (2, 2, 6)
    assert (stats.distinct_adapters, stats.base_rows) == (1, 2)
    assert (stats.running, stats.waiting) == (3, 1)
    assert (stats.used_blocks, stats.free_blocks) == (12, 8)
    assert stats.adapter_bytes == 9


@pytest.mark.lock_step
def test_a_row_whose_request_ends_in_the_step_counts_as_what_it_was_computed_with() -> None:
    engine = Engine(OracleRunner(merge_budget_bytes=10, num_slots=4))
    merged, other = adapter("a", merge_nbytes=5), adapter("b")
    engine.core.control(Merge(1, merged))
    engine.core.control(Load(2, other))
    engine.run()
    for id, refs in enumerate(([merged], [merged], [other], [merged, other], []), 1):
        engine.submit(id, [id], 1, adapters=refs)
    done = engine.step()
    assert done is not None
    assert {output.id for output in done.outputs if output.finish} == {1, 2, 3, 4, 5}
    stats = done.stats
    assert (stats.base_rows, stats.merged_rows, stats.distinct_adapters) == (1, 2, 2)


def test_a_second_request_with_a_live_id_is_dropped_and_harms_nobody() -> None:
    engine = Engine()
    engine.submit(1, [1], 4)
    engine.submit(1, [2], 4)
    engine.run()
    assert engine.tokens(1) == continuation([1], [], 4)


def test_adapters_are_read_on_a_thread_of_the_engine_by_default() -> None:
    runner = OracleRunner()
    core = EngineCore(runner)
    core.add(Submit(1, [1, 2], 3, adapters=[AdapterRef("sha256:a", "{}")], sampling=GREEDY))
    tokens: list[int] = []
    while not core.idle:
        done = [m for m in core.step() if isinstance(m, StepReport)]
        tokens += [t for step in done for output in step.outputs for t in output.token_ids]
    assert tokens == continuation([1, 2], [("sha256:a", 1.0)], 3)


def test_the_oracle_notices_a_block_that_was_mixed_up() -> None:
    """The oracle itself: it must not give the right answer from the wrong memory."""
    engine = Engine(OracleRunner(num_blocks=8, block_size=2), prefix_cache=False)
    engine.submit(1, [1, 2, 3], 6)
    engine.step()
    request = engine.core._requests[1]
    request.blocks[0], request.blocks[1] = request.blocks[1], request.blocks[0]
    engine.run()
    assert engine.tokens(1) != continuation([1, 2, 3], [], 6)


@pytest.mark.lock_step
def test_the_oracle_notices_weights_that_were_swapped() -> None:
    engine = Engine()
    engine.submit(1, [1], 6, adapters=[adapter("a")])
    engine.step()
    engine.loader.finish()
    engine.step()
    slot = engine.core._requests[1].mix[0][0]
    engine.runner.slots[slot] = engine.runner.read_adapter(adapter("b"))
    engine.run()
    assert engine.tokens(1) != continuation([1], [("sha256:a", 1.0)], 6)
    assert np.array_equal(engine.tokens(1)[:1], continuation([1], [("sha256:a", 1.0)], 1))
