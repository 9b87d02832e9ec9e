"""An engine that launches one pass ahead: the same answers, and a device that never waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from engine.driving import GREEDY, AheadEngine, Engine, adapter
from engine.oracle import OracleRunner, continuation
from engine.test_sampling_cost import COSTLY, COSTLY_SECONDS, FORWARD_SECONDS, with_costs
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.request import Request
from loraplex_server.engine.batching.scheduler import BatchRow, Scheduler
from loraplex_server.engine.batching.turns import SHARE
from loraplex_server.engine.core import MAX_FAULTS
from loraplex_server.engine.messages import Load, Merge, SamplingParams, Unload, Unmerge
from loraplex_server.engine.passes.one_ahead import OneAhead


def launched_before_read(engine: Engine, launch: int) -> bool:
    """Whether a launch was made before the one before it was read."""
    log = engine.device.log
    return log.index(f"launch {launch}") < log.index(f"read {launch - 1}")


# the pace


def test_every_pass_of_steady_decoding_is_launched_before_the_one_before_is_read() -> None:
    engine = AheadEngine(OracleRunner(num_blocks=400), token_budget=16, max_running=8)
    for id in range(1, 5):
        engine.submit(id, [id] * 5, 30, adapters=[adapter("a")] if id % 2 else [])
    engine.run()
    # Loading an adapter, and 20 prompt tokens in chunks of 16, take the first few passes.
    steady = range(2, engine.device.launches + 1)
    assert all(launched_before_read(engine, launch) for launch in steady)
    assert engine.device.most_in_flight == 2
    assert engine.device.launches <= 34
    assert engine.last is not None
    assert engine.last.stats.wasted_rows == 0


def test_a_place_is_free_as_soon_as_the_last_token_of_a_request_is_launched() -> None:
    engine = AheadEngine(max_running=1)
    for id in range(1, 11):
        engine.submit(id, [id], 1)
    engine.run()
    assert engine.device.launches == 10
    assert all(launched_before_read(engine, launch) for launch in range(2, 11))
    assert all(engine.tokens(id) == continuation([id], [], 1) for id in range(1, 11))


def test_rows_that_are_chosen_on_the_host_do_not_hold_up_the_others() -> None:
    engine = AheadEngine(OracleRunner(num_blocks=100), max_running=3)
    biased = SamplingParams(temperature=0.0, logit_bias={3: 0.5})
    engine.submit(1, [1], 20)
    engine.submit(2, [2], 10, logprobs=1)
    engine.submit(3, [3], 10, sampling=biased)
    engine.run()
    assert all(launched_before_read(engine, launch) for launch in range(2, 21))
    rows = [len(batch.context_lens) for batch in engine.runner.batches]
    assert rows == [3, 1] * 10
    for id, count in ((1, 20), (2, 10), (3, 10)):
        assert engine.tokens(id) == continuation([id], [], count)


def test_prompt_log_probabilities_alone_do_not_hold_up_a_request() -> None:
    engine = AheadEngine(token_budget=4, max_running=4)
    engine.submit(1, [5] * 9, 6, prompt_logprobs=1)
    engine.run()
    assert all(launched_before_read(engine, n) for n in range(2, engine.device.launches + 1))
    assert engine.tokens(1) == continuation([5] * 9, [], 6)
    assert len(engine.outputs[1][0].prompt_logprobs) == 8


def test_an_engine_rests_only_when_its_last_launch_is_read() -> None:
    engine = AheadEngine()
    engine.submit(1, [1], 50)
    engine.step()
    engine.core.abort(1)
    assert not engine.core.idle
    assert engine.core.wait_seconds() == 0.0
    engine.step()
    assert engine.core.idle
    assert engine.core.wait_seconds() is None
    engine.core.check()


def test_the_durations_of_passes_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AheadEngine()
    forward = engine.runner.forward

    def timed(batch: Any) -> np.ndarray:
        engine.clock.now += FORWARD_SECONDS
        return forward(batch)

    monkeypatch.setattr(engine.runner, "forward", timed)
    engine.submit(1, [1], 6)
    begun, seconds = engine.clock.now, []
    while not engine.core.idle:
        done = engine.step()
        if done is not None and done.stats.decode_rows:
            seconds.append(done.stats.step_seconds)
        if done is not None and not done.outputs:
            engine.clock.now += 1.0  # the device works meanwhile
    assert seconds[1:] == pytest.approx([FORWARD_SECONDS] * 5)
    assert sum(seconds) == pytest.approx(engine.clock.now - begun)


# what is learnt late


def test_a_stop_wastes_exactly_one_row_of_one_pass_and_an_end_by_length_none() -> None:
    engine = AheadEngine(OracleRunner(num_blocks=100))
    expected = continuation([1], [], 20)
    engine.submit(1, [1], 20, stop_token_ids=[expected[7]])
    engine.submit(2, [2], 20)
    engine.submit(3, [3], 5)
    engine.run()
    assert engine.tokens(1) == expected[:7]
    assert [engine.outcome(id) for id in (1, 2, 3)] == ["stop", "length", "length"]
    assert engine.last is not None
    assert engine.last.stats.wasted_rows == 1
    rows = [len(batch.context_lens) for batch in engine.runner.batches]
    assert rows == [3] * 5 + [2] * 4 + [1] * 11


@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_an_end_while_a_launch_is_under_way_frees_everything_at_once(how: str) -> None:
    engine = AheadEngine()
    engine.submit(1, [1], 50, deadline=engine.clock.now + 5.0)
    engine.submit(2, [2], 8)
    for _ in range(4):
        engine.step()
    tokens = engine.tokens(1)
    assert tokens == continuation([1], [], 50)[:3]
    held = engine.core._pool.used
    if how == "abort":
        engine.core.abort(1)
        assert engine.core._pool.used < held
        engine.core.check_books()
    else:
        engine.clock.now += 5.0
    engine.step()
    assert engine.tokens(1) == tokens
    assert engine.outcome(1) == (None if how == "abort" else "DEADLINE_EXCEEDED")
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.wasted_rows == 1
    assert engine.tokens(2) == continuation([2], [], 8)
    engine.core.check()


def test_a_row_that_is_not_finite_fails_alone_and_wastes_the_row_behind_it() -> None:
    engine = AheadEngine(OracleRunner(nonfinite_token=7))
    engine.submit(1, [1], 6)
    engine.submit(2, [7], 6)
    engine.run()
    assert engine.outcome(2) == "NON_FINITE_LOGITS"
    assert engine.tokens(1) == continuation([1], [], 6)
    assert engine.last is not None
    assert engine.last.stats.wasted_rows == 1


# the weights that a launch reads


def busy_with(*names: str) -> AheadEngine:
    """An engine with a launch in flight that uses these adapters, which two requests run with."""
    engine = AheadEngine(OracleRunner(num_blocks=200, merge_budget_bytes=100, num_slots=2))
    for op, name in enumerate(names, 900):
        engine.core.control(Load(op, adapter(name, nbytes=10, merge_nbytes=10)))
    engine.run()
    for id, name in enumerate(names, 1):
        engine.submit(id, [id], 60, adapters=[adapter(name, nbytes=10, merge_nbytes=10)])
    for _ in range(3):
        engine.step()
    assert engine.core._passes.in_flight
    return engine


def test_a_forced_unload_removes_the_weights_when_no_launch_reads_them() -> None:
    engine = busy_with("a", "b")
    engine.core.control(Unload(1, "sha256:a", force=True))
    engine.step()  # the oracle checks that the slot is not read any more
    assert engine.controls[1].error is None
    assert engine.outcome(1) == "ADAPTER_UNLOADED"
    engine.run()
    assert engine.tokens(2) == continuation([2], [("sha256:b", 1.0)], 60)


def test_a_slot_gets_other_weights_when_no_launch_reads_the_old_ones() -> None:
    engine = busy_with("a", "b")
    engine.submit(3, [3], 5, adapters=[adapter("c", nbytes=10)])
    engine.core.abort(1)
    engine.run()
    assert engine.tokens(3) == continuation([3], [("sha256:c", 1.0)], 5)
    assert engine.tokens(2) == continuation([2], [("sha256:b", 1.0)], 60)


def test_copies_of_a_running_adapter_are_used_and_dropped_between_launches() -> None:
    engine = busy_with("a")
    engine.core.control(Merge(1, adapter("a", nbytes=10, merge_nbytes=10)))
    engine.step()
    engine.loader.finish()
    engine.step()
    assert engine.controls[1].error is None
    engine.step()
    engine.core.control(Unmerge(2, "sha256:a"))
    engine.run()
    assert engine.controls[2].error is None
    assert engine.tokens(1) == continuation([1], [("sha256:a", 1.0)], 60)


def unload(engine: AheadEngine) -> None:
    engine.core.control(Unload(1, "sha256:a", force=True))
    engine.step()


def merge(engine: AheadEngine) -> None:
    engine.core.control(Merge(1, adapter("a", nbytes=10, merge_nbytes=10)))
    engine.step()
    engine.loader.finish()
    engine.step()
    if engine.merges[0].error is not None:
        raise AssertionError(engine.merges[0].error.reason)


def unmerge(engine: AheadEngine) -> None:
    slot = engine.core.adapters.slots.residents["sha256:a"]
    engine.runner.publish_merge(slot.slot, engine.runner.merge_adapter(engine.runner.slots[0]))
    slot.merged_bytes = 10
    engine.core.control(Unmerge(2, "sha256:a"))


@pytest.mark.parametrize("change", [unload, merge, unmerge])
def test_the_oracle_notices_a_slot_that_is_changed_too_early(
    change: Callable[[AheadEngine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(busy_with("a"))
    monkeypatch.setattr(OneAhead, "settle_slot", lambda self, slot: None)
    engine = busy_with("a")
    with pytest.raises(AssertionError, match=r"reads this slot|ENGINE_FAULT"):
        change(engine)


# faults


def test_a_launch_that_fails_costs_its_rows_after_the_tokens_before_are_read() -> None:
    engine = AheadEngine()
    engine.submit(1, [1], 3)
    engine.submit(2, [2], 9)
    engine.submit(3, [3], 9, stop_token_ids=[continuation([3], [], 3)[2]])
    for _ in range(3):
        engine.step()
    engine.device.failing_launches = 1
    engine.step()  # reads the third tokens; the launch of the fourth ones fails
    assert engine.tokens(1) == continuation([1], [], 3)
    assert engine.tokens(2) == continuation([2], [], 3)
    assert engine.tokens(3) == continuation([3], [], 2)
    assert [engine.outcome(id) for id in (1, 2, 3)] == ["length", "ENGINE_FAULT", "stop"]
    engine.submit(4, [4], 3)
    engine.run()
    assert engine.tokens(4) == continuation([4], [], 3)
    engine.core.check()


@pytest.mark.parametrize("where", ["launch", "read"])
def test_passes_that_fail_in_a_row_break_an_engine(where: str) -> None:
    engine = AheadEngine(OracleRunner(fault_token=7), max_running=1)
    for id in range(MAX_FAULTS):
        assert not engine.core.broken
        engine.submit(id, [7 if where == "read" else 1], 5)
        engine.device.failing_launches = where == "launch"
        while engine.outcome(id) is None:
            engine.step()
    assert engine.core.broken


# the same answers at both paces

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 5.0, 50.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    top_k=st.sampled_from([0, 3, 40]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 20.0]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {3: 4.0, 7: -30.0}]),
    seed=st.integers(0, 1 << 60),
)
REQUESTS = st.fixed_dictionaries(
    {
        "token_ids": st.lists(st.integers(0, 12), min_size=1, max_size=9),
        "max_new_tokens": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 12),
        "sampling": SAMPLING | st.just(GREEDY),
        "stop_token_ids": st.lists(st.integers(0, 511), max_size=60),
        "logprobs": st.none() | st.integers(0, 2),
        "prompt_logprobs": st.none() | st.integers(0, 2),
        "priority": st.integers(-3, 3),
        "adapters": st.sampled_from(
            [[], [adapter("a")], [adapter("a"), adapter("b", 0.5)], [adapter("v", virtual=5)]]
        ),
    }
)


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=7),
    gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    num_blocks=st.integers(12, 40),
    token_budget=st.integers(4, 30),
    max_running=st.integers(1, 4),
)
def test_both_paces_give_the_same_answers(
    requests: list[dict[str, Any]],
    gaps: list[int],
    num_blocks: int,
    token_budget: int,
    max_running: int,
) -> None:
    answers = []
    for engine_class in (Engine, AheadEngine):
        runner = OracleRunner(num_blocks=num_blocks, block_size=2, prefix_blocks=8)
        engine = engine_class(runner, token_budget=token_budget, max_running=max_running)
        for id, (request, gap) in enumerate(zip(requests, gaps, strict=False), 1):
            engine.submit(id, **request)
            for _ in range(gap):
                engine.step()
                engine.core.check_books()
        engine.run()
        engine.core.check()
        answers.append({id: _answer(engine, id) for id in engine.outputs})
    assert answers[0] == answers[1]


def _answer(engine: Engine, id: int) -> tuple[object, ...]:
    """Everything that a request was answered, without times and without how it was divided."""
    outputs = engine.outputs[id]
    return (
        engine.tokens(id),
        [entry for output in outputs for entry in output.logprobs],
        [entry for output in outputs for entry in output.prompt_logprobs],
        engine.outcome(id),
    )


@pytest.mark.parametrize("sampling", [GREEDY, COSTLY])
def test_costly_rows_of_the_host_take_turns_beside_rows_that_run_ahead(
    sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the parameters of those are: choosing their tokens costs the host nothing."""
    alone = Engine()
    alone.submit(1, [5], 60, sampling=sampling)
    alone.run()
    monkeypatch.setattr(Engine, "is_ahead", True)
    engine = with_costs(monkeypatch, rows=33)
    costly = msgspec.structs.replace(COSTLY, logit_bias={3: 0.0})
    for id in range(2, 34):
        engine.submit(id, [id], 12, sampling=costly)
    engine.submit(1, [5], 60, sampling=sampling)
    times: list[float] = []
    while engine.outcome(1) is None:
        tokens = len(engine.tokens(1))
        engine.step()
        if len(engine.tokens(1)) > tokens:
            times.append(engine.clock.now)
    gaps = np.diff(times)
    assert len(gaps) == 59
    assert gaps.max() <= (1 + SHARE) * FORWARD_SECONDS + COSTLY_SECONDS + 1e-9
    assert engine.tokens(1) == alone.tokens(1)
    assert min(len(engine.tokens(id)) for id in range(2, 34)) >= 3


def test_costly_rows_of_the_host_that_are_preempted_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costly = {
        id: SamplingParams(temperature=50.0, top_p=0.99, seed=id, logit_bias={3: 0.0})
        for id in range(2, 8)
    }
    alone = Engine(OracleRunner(num_blocks=40))
    monkeypatch.setattr(Engine, "is_ahead", True)
    # A turn lasts so long that the next one waits for several steps.
    monkeypatch.setattr("engine.test_sampling_cost.COSTLY_SECONDS", 0.02)
    engine = with_costs(monkeypatch, rows=8, num_blocks=14)
    preempt, met = Scheduler._preempt, []

    def noting(scheduler: Scheduler, request: Request, rows: list[BatchRow]) -> None:
        met.append(request.awaits_token and request.draw.is_costly)
        preempt(scheduler, request, rows)

    monkeypatch.setattr(Scheduler, "_preempt", noting)
    for id, params in costly.items():
        alone.submit(id, [id], 12, sampling=params)
        alone.run()
        engine.submit(id, [id], 12, sampling=params)
    engine.submit(1, [1], 40, priority=5)
    while not engine.core.idle:
        engine.step()
        engine.core.check_books()
    assert any(met)
    for id in costly:
        assert engine.tokens(id) == alone.tokens(id)
    assert engine.tokens(1) == continuation([1], [], 40)
