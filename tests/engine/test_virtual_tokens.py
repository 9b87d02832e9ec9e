"""Virtual tokens: computed once, shared by every request of their adapter, freed with its slot."""

from __future__ import annotations

import numpy as np
import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation
from loraplex_server.engine.messages import AdapterRef, Load, Unload

pytestmark = pytest.mark.usefixtures("pace")


def engine_with(prefix_blocks: int = 8, num_blocks: int = 40, **limits: int) -> Engine:
    return Engine(OracleRunner(num_blocks=num_blocks, prefix_blocks=prefix_blocks), **limits)


def expected(name: str, prompt: list[int], count: int, virtual: int) -> list[int]:
    return continuation(prompt, [(f"sha256:{name}", 1.0)], count, virtual=virtual)


def prefix_blocks(engine: Engine) -> int:
    assert engine.last is not None
    return engine.last.stats.prefix_blocks


@pytest.mark.parametrize("virtual", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("budget", [1, 3, 64])
def test_own_tokens_stand_behind_the_virtual_ones(virtual: int, budget: int) -> None:
    engine = engine_with(token_budget=budget, max_running=1)
    ref = adapter("v", virtual=virtual)
    for id in (1, 2):
        engine.submit(id, [5, 6, 7, 8, 9][: 3 + id], 6, adapters=[ref])
    engine.run()
    for id in (1, 2):
        prompt = [5, 6, 7, 8, 9][: 3 + id]
        assert engine.tokens(id) == expected("v", prompt, 6, virtual)
    engine.core.check()


def test_requests_share_the_full_blocks_and_copy_the_last_one_once_each() -> None:
    engine = engine_with()
    for id in (1, 2, 3):
        engine.submit(id, [id], 4, adapters=[adapter("v", virtual=6)])
    engine.run()
    copies = np.concatenate([batch.copies for batch in engine.runner.batches])
    assert len(copies) == 3
    assert len(set(copies[:, 0])) == 1
    assert len(set(copies[:, 1])) == 3
    for batch in engine.runner.batches:
        assert len(set(batch.block_tables[:, 0])) == 1


def test_adapters_and_base_rows_mix_in_one_batch_with_them() -> None:
    engine = engine_with()
    refs = {1: adapter("v", virtual=5), 2: adapter("lora"), 3: adapter("w", virtual=4)}
    for id in range(1, 5):
        engine.submit(id, [id, 9], 5, adapters=[refs[id]] if id in refs else [])
    engine.run()
    assert engine.tokens(1) == expected("v", [1, 9], 5, 5)
    assert engine.tokens(2) == expected("lora", [2, 9], 5, 0)
    assert engine.tokens(3) == expected("w", [3, 9], 5, 4)
    assert engine.tokens(4) == continuation([4, 9], [], 5)


def test_after_preemption_the_part_full_block_is_copied_again() -> None:
    engine = engine_with(num_blocks=5, max_running=2)
    engine.submit(1, [1] * 4, 10, adapters=[adapter("v", virtual=6)], priority=1)
    engine.submit(2, [2] * 4, 8, adapters=[adapter("v", virtual=6)])
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions >= 1
    assert engine.tokens(1) == expected("v", [1] * 4, 10, 6)
    assert engine.tokens(2) == expected("v", [2] * 4, 8, 6)
    engine.core.check()


def test_prompt_logprobs_tell_of_real_tokens_only() -> None:
    engine = engine_with(token_budget=2, max_running=1)
    engine.submit(1, [5, 6, 7, 8], 2, adapters=[adapter("v", virtual=5)], prompt_logprobs=1)
    engine.run()
    first = engine.outputs[1][0]
    assert [entry.token_id for entry in first.prompt_logprobs] == [6, 7, 8]
    tops = [entry.top[0][0] for entry in first.prompt_logprobs]
    assert tops == [expected("v", [5, 6, 7, 8][:n], 1, 5)[0] for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "refs",
    [
        [adapter("v", virtual=2), adapter("lora")],
        [adapter("v", virtual=2), adapter("w", virtual=2)],
        [adapter("v", 0.5, virtual=2)],
        [adapter("v", 1.0, virtual=2), adapter("v", 1.0, virtual=2)],
    ],
)
@pytest.mark.parametrize("is_resident", [False, True])
def test_they_cannot_be_mixed_or_weighted(refs: list[AdapterRef], is_resident: bool) -> None:
    engine = engine_with()
    if is_resident:
        for op, ref in enumerate(refs):
            engine.core.control(Load(op, ref))
        engine.run()
    engine.submit(1, [1], 2, adapters=refs)
    engine.submit(2, [1], 2, adapters=[adapter("v", virtual=2)])
    engine.run()
    assert engine.outcome(1) == "ADAPTER_NOT_MIXABLE"
    assert engine.tokens(2) == expected("v", [1], 2, 2)


def test_two_halves_of_one_adapter_are_one_whole() -> None:
    engine = engine_with()
    halves = [adapter("v", 0.5, virtual=2), adapter("v", 0.5, virtual=2)]
    engine.submit(1, [1], 2, adapters=halves)
    engine.run()
    assert engine.tokens(1) == expected("v", [1], 2, 2)


def test_a_prompt_that_is_too_long_behind_them_is_refused_and_the_longest_is_served() -> None:
    context = Engine(OracleRunner(num_blocks=40, prefix_blocks=4, max_context=20))
    cache = Engine(OracleRunner(num_blocks=4, prefix_blocks=4))
    for engine, longest in [(context, 20 - 6), (cache, 16 - 2 + 1)]:
        engine.submit(1, [1] * (longest - 4), 4, adapters=[adapter("v", virtual=6)])
        engine.submit(2, [1] * (longest - 3), 4, adapters=[adapter("v", virtual=6)])
        engine.run()
        assert engine.outcome(1) == "length"
        assert engine.outcome(2) == "PROMPT_TOO_LONG"


def test_more_than_the_blocks_set_aside_is_too_large_and_evicts_nobody() -> None:
    engine = engine_with(prefix_blocks=2)
    engine.submit(1, [1], 2, adapters=[adapter("v", virtual=8)])
    engine.submit(2, [1], 2, adapters=[adapter("w", virtual=9)])
    engine.run()
    assert engine.outcome(1) == "length"
    assert engine.outcome(2) == "ADAPTER_TOO_LARGE"
    assert prefix_blocks(engine) == 2
    assert engine.core.adapters.slots.evictions == 0


def test_only_who_has_blocks_leaves_for_want_of_blocks() -> None:
    engine = engine_with(prefix_blocks=2)
    for op, ref in enumerate([adapter("lora"), adapter("v", virtual=8), adapter("lora2")]):
        engine.core.control(Load(op, ref))
        engine.run()
    engine.submit(1, [1], 2, adapters=[adapter("w", virtual=3)])
    engine.run()
    residents = engine.core.adapters.slots.residents
    assert {digest.removeprefix("sha256:") for digest in residents} == {"lora", "lora2", "w"}
    assert engine.tokens(1) == expected("w", [1], 2, 3)


def test_blocks_wait_for_the_requests_that_read_them() -> None:
    engine = engine_with(prefix_blocks=2)
    engine.submit(1, [1], 12, adapters=[adapter("v", virtual=8)])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.submit(2, [2], 2, adapters=[adapter("w", virtual=8)])
    engine.run()
    assert engine.tokens(1) == expected("v", [1], 12, 8)
    assert engine.tokens(2) == expected("w", [2], 2, 8)


def test_blocks_are_free_after_unloading_and_after_a_failed_publication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_with(prefix_blocks=2)

    def fail(slot: int, loaded: object, blocks: list[int]) -> None:
        raise MemoryError("a secret of the device")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "publish_adapter", fail)
        engine.core.control(Load(1, adapter("v", virtual=8)))
        engine.run()
    assert engine.core.adapters.slots.prefix_blocks == 0
    engine.submit(1, [1], 2, adapters=[adapter("v", virtual=8)])
    engine.run()
    assert engine.outcome(1) == "length"
    engine.core.control(Unload(2, "sha256:v"))
    engine.run()
    assert engine.core.adapters.slots.prefix_blocks == 0
    engine.core.check()
