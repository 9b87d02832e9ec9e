"""Requests for final states: one vector each, exact in any batch and in any chunks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from engine.driving import AheadEngine, Engine, adapter
from engine.oracle import OracleRunner, states
from loraplex_model.base.refusal import Reason
from loraplex_server.engine.passes.pooling import Pool

WIDTH = 16

EngineKind = type[Engine]


@pytest.fixture(params=[Engine, AheadEngine], ids=["lock step", "one ahead"])
def kind(request: pytest.FixtureRequest) -> EngineKind:
    found: EngineKind = request.param
    return found


def embed(engine: Engine, id: int, ids: list[int], pooling: str = "last", **fields: Any) -> None:
    engine.submit(id, ids, 1, pooling=pooling, **fields)


def vector(engine: Engine, id: int) -> np.ndarray:
    assert engine.outcome(id) == "length"
    (output,) = engine.outputs[id]
    assert output.token_ids == []
    return np.frombuffer(output.state, np.float32)


def expected(ids: list[int], pooling: str, mix: Any = (), **more: Any) -> np.ndarray:
    found = states(ids, list(mix), WIDTH, **more).astype(np.float64)
    if pooling == "last":
        return found[-1].astype(np.float32)
    total = found[0]
    for state in found[1:]:
        total = total + state
    return (total / len(found)).astype(np.float32)


def prompt(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(20, 500), k=count)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("budget", [4, 7, 512])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 29])
def test_a_vector_is_that_of_the_whole_prompt_in_any_chunks(
    kind: EngineKind, pooling: str, budget: int, count: int
) -> None:
    engine = kind(token_budget=budget, max_running=4)
    ids = prompt(count, count)
    embed(engine, 1, ids, pooling)
    engine.run()
    assert np.array_equal(vector(engine, 1), expected(ids, pooling))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_does_not_depend_on_its_neighbours(kind: EngineKind, pooling: str) -> None:
    engine = kind(OracleRunner(num_blocks=48), token_budget=8, max_running=6)
    mix = adapter("a")
    wanted = {}
    for i in range(12):
        ids = prompt(i, 3 + 2 * i)
        if i % 3 == 0:
            engine.submit(i, ids, 6, adapters=[mix] * (i % 2))
        else:
            refs = [mix] * (i % 2)
            embed(engine, i, ids, pooling, adapters=refs)
            wanted[i] = expected(ids, pooling, [("sha256:a", 1.0)] * (i % 2))
    engine.run()
    assert len(wanted) == 8
    for i, each in wanted.items():
        assert np.array_equal(vector(engine, i), each)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_preempted_requests_get_the_same_vector(kind: EngineKind, pooling: str) -> None:
    engine = kind(OracleRunner(num_blocks=12), token_budget=4, max_running=4, prefix_cache=False)
    engine.submit(1, prompt(1, 10), 20)
    engine.submit(2, prompt(2, 8), 20)
    for _ in range(12):
        engine.step()
    ids = prompt(3, 14)
    embed(engine, 3, ids, pooling, priority=-10)
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions
    assert np.array_equal(vector(engine, 3), expected(ids, pooling))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_equal_beginnings_are_shared_only_where_states_are_not_needed(
    kind: EngineKind, pooling: str
) -> None:
    engine = kind()
    ids = prompt(1, 22)
    engine.submit(1, ids, 2)
    engine.run()
    embed(engine, 2, ids, pooling)
    engine.run()
    assert np.array_equal(vector(engine, 2), expected(ids, pooling))
    (output,) = engine.outputs[2]
    assert output.cached_tokens == (20 if pooling == "last" else 0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_what_an_embedded_text_leaves_is_found_by_generation(
    kind: EngineKind, pooling: str
) -> None:
    engine = kind()
    ids = prompt(1, 22)
    embed(engine, 1, ids, pooling)
    engine.run()
    engine.submit(2, ids, 4)
    engine.run()
    assert engine.outputs[2][0].cached_tokens == 20


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_virtual_tokens_stand_before_the_text_and_are_not_part_of_the_mean(
    kind: EngineKind, pooling: str
) -> None:
    engine = kind(OracleRunner(prefix_blocks=4))
    ids = prompt(4, 9)
    embed(engine, 1, ids, pooling, adapters=[adapter("p", virtual=6)])
    engine.run()
    assert np.array_equal(vector(engine, 1), expected(ids, pooling, [("sha256:p", 1.0)], virtual=6))


@pytest.mark.parametrize(("ids", "active"), [([30, 31, 9, 8, 32], 2), ([30, 31, 32], None)])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_activated_lora_acts_from_its_invocation_on(
    kind: EngineKind, pooling: str, ids: list[int], active: int | None
) -> None:
    engine = kind()
    embed(engine, 1, ids, pooling, adapters=[adapter("i", invocation=[9, 8])])
    engine.run()
    mix = [("sha256:i", 1.0)]
    assert np.array_equal(vector(engine, 1), expected(ids, pooling, mix, active=active))
    (output,) = engine.outputs[1]
    assert output.base_tokens == (len(ids) if active is None else active)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_state_that_is_not_finite_fails_its_request_alone(kind: EngineKind, pooling: str) -> None:
    engine = kind(OracleRunner(nonfinite_token=7), token_budget=6, max_running=4)
    embed(engine, 1, [30, 7, *prompt(2, 12)], pooling)
    ids = prompt(3, 12)
    embed(engine, 2, ids, pooling)
    engine.run()
    assert engine.outcome(1) == Reason.NON_FINITE_LOGITS
    assert np.array_equal(vector(engine, 2), expected(ids, pooling))


def test_an_aborted_request_leaves_nothing(kind: EngineKind) -> None:
    engine = kind(token_budget=4, max_running=2)
    embed(engine, 1, prompt(1, 30), "mean")
    engine.step()
    engine.core.abort(1)
    engine.run()
    assert 1 not in engine.outputs
    engine.core.check()


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_requests_gives_exact_vectors_and_leaves_nothing(
    kind: EngineKind, seed: int
) -> None:
    chance = random.Random(seed)
    engine = kind(
        OracleRunner(num_blocks=20, num_slots=2, adapter_budget_bytes=30),
        token_budget=chance.choice([4, 9, 64]),
        max_running=4,
    )
    refs = [adapter(name, nbytes=12) for name in "abc"]
    wanted: dict[int, np.ndarray] = {}
    for i in range(40):
        ids = prompt(chance.randrange(6), chance.randrange(1, 24))
        ref = chance.choice([None, *refs])
        given = [] if ref is None else [ref]
        if chance.random() < 0.4:
            engine.submit(i, ids, chance.randrange(1, 9), adapters=given)
        else:
            pooling = chance.choice(["last", "mean"])
            embed(engine, i, ids, pooling, adapters=given)
            wanted[i] = expected(ids, pooling, [(each.digest, 1.0) for each in given])
        if chance.random() < 0.1:
            engine.core.abort(i)
            wanted.pop(i, None)
        for _ in range(chance.randrange(3)):
            engine.step()
            while engine.loader.jobs:
                engine.loader.finish()
        engine.core.check_books()
    engine.run()
    for i, each in wanted.items():
        assert np.array_equal(vector(engine, i), each), f"request {i} of seed {seed}"
    engine.core.check()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_of_unit_length_has_the_direction_of_the_raw_one(
    kind: EngineKind, pooling: str
) -> None:
    engine = kind()
    ids = prompt(8, 9)
    embed(engine, 1, ids, pooling, unit_length=True)
    engine.run()
    raw = expected(ids, pooling).astype(np.float64)
    found = vector(engine, 1)
    assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found, raw / np.linalg.norm(raw), rtol=0, atol=1e-7)


def test_a_vector_of_zeros_stays_one() -> None:
    pool = Pool(takes_all=False, has_unit_length=True)
    pool.add(0, np.zeros((1, WIDTH), np.float32))
    assert not pool.vector().any()
