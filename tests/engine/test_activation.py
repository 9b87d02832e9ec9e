"""Activated LoRA in the engine: the base computes what stands before the invocation, to the token.

The oracle's KV entries differ with the adapters that wrote them, so one token on the wrong side of
the invocation changes every answer.
"""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation, invoked_at
from loraplex_server.engine.batching.activation import NEVER, active_from
from loraplex_server.engine.messages import AdapterRef, Load, Merge, Unload

pytestmark = pytest.mark.usefixtures("pace")

INVOCATION = [7, 8]
PROMPTS: dict[str, list[int]] = {
    "in the middle": [1, 2, 3, 7, 8, 4, 5],
    "at the start": [7, 8, 1, 2],
    "at the end": [1, 2, 3, 4, 5, 7, 8],
    "nothing else": [7, 8],
    "several": [7, 8, 1, 7, 8, 2, 7, 7, 8, 3],
    "none": [1, 2, 8, 7, 3],
    "cut off at the end": [1, 7, 8, 2, 7],
    "shorter than the invocation": [7],
}


def alora(name: str = "i", weight: float = 1.0, invocation: list[int] = INVOCATION) -> AdapterRef:
    return adapter(name, weight, invocation=invocation)


def expected(prompt: list[int], count: int, name: str = "i", weight: float = 1.0) -> list[int]:
    at = invoked_at(prompt, INVOCATION)
    return continuation(prompt, [(f"sha256:{name}", weight)], count, active=at)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6, 64])
def test_it_acts_from_the_last_invocation_on_however_the_prompt_is_cut(
    prompt: list[int], budget: int
) -> None:
    engine = Engine(token_budget=budget, max_running=1)
    engine.submit(1, prompt, 6, adapters=[alora()])
    engine.run()
    assert engine.tokens(1) == expected(prompt, 6)
    at = invoked_at(prompt, INVOCATION)
    first, *others = engine.outputs[1]
    assert first.base_tokens == (len(prompt) if at is None else at)
    assert not any(output.base_tokens for output in others)
    engine.core.check()


def test_generated_invocation_tokens_do_not_move_the_beginning() -> None:
    """The model is made to say the invocation; a later preemption computes it as if prompt."""
    for prompt in ([1, 2, 99], [7, 8, 99]):
        runner = OracleRunner(scripts={99: [7, 8, 5]})
        engine = Engine(runner)
        engine.submit(1, prompt, 5, adapters=[alora()])
        engine.run()
        assert engine.tokens(1)[:3] == [7, 8, 5]
        used = np.concatenate([batch.mix_slots for batch in runner.batches])
        assert bool(len(used)) == (prompt[0] == 7)


def test_kinds_of_rows_share_a_batch() -> None:
    engine = Engine(OracleRunner(num_slots=6))
    refs = {1: [alora()], 2: [adapter("lora")], 3: [], 4: [alora("j")], 5: [alora(weight=0.5)]}
    prompt = PROMPTS["in the middle"]
    for id, adapters in refs.items():
        engine.submit(id, prompt, 5, adapters=adapters)
    engine.submit(6, PROMPTS["none"], 5, adapters=[alora()])
    engine.run()
    assert engine.tokens(1) == expected(prompt, 5)
    assert engine.tokens(2) == continuation(prompt, [("sha256:lora", 1.0)], 5)
    assert engine.tokens(3) == continuation(prompt, [], 5)
    assert engine.tokens(4) == expected(prompt, 5, "j")
    assert engine.tokens(5) == expected(prompt, 5, weight=0.5)
    assert engine.tokens(6) == continuation(PROMPTS["none"], [], 5)
    assert all(not engine.outputs[id][0].base_tokens for id in (2, 3))


def test_a_preempted_request_keeps_its_beginning() -> None:
    engine = Engine(OracleRunner(num_blocks=7), max_running=2, prefix_cache=False)
    prompt = [1, 2, 3, 7, 8, 4]
    engine.submit(1, prompt, 14, adapters=[alora()], priority=1)
    engine.submit(2, prompt, 12, adapters=[alora()])
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions >= 1
    assert engine.tokens(1) == expected(prompt, 14)
    assert engine.tokens(2) == expected(prompt, 12)
    engine.core.check()


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompt_logprobs_are_those_of_base_and_adapter(prompt: list[int]) -> None:
    engine = Engine(token_budget=3, max_running=1)
    engine.submit(1, prompt, 2, adapters=[alora()], prompt_logprobs=1)
    engine.run()
    scored = engine.outputs[1][0].prompt_logprobs
    assert [entry.token_id for entry in scored] == prompt[1:]
    at = invoked_at(prompt, INVOCATION)
    for size, entry in enumerate(scored, start=1):
        part = continuation(prompt[:size], [("sha256:i", 1.0)], 1, active=at)
        assert entry.top[0][0] == part[0]


@pytest.mark.parametrize("is_resident", [False, True])
def test_it_cannot_be_part_of_a_mix(is_resident: bool) -> None:
    engine = Engine()
    refs = [alora(weight=0.5), adapter("lora", 0.5)]
    if is_resident:
        for op, ref in enumerate(refs):
            engine.core.control(Load(op, ref))
        engine.run()
    engine.submit(1, PROMPTS["in the middle"], 3, adapters=refs)
    engine.submit(2, PROMPTS["in the middle"], 3, adapters=[alora(weight=0.5), alora(weight=0.5)])
    engine.run()
    assert engine.outcome(1) == "ADAPTER_NOT_MIXABLE"
    assert engine.tokens(2) == expected(PROMPTS["in the middle"], 3)
    engine.core.check()


def test_rows_before_the_invocation_are_counted_as_the_bases() -> None:
    engine = Engine(OracleRunner(merge_budget_bytes=100), token_budget=4, max_running=1)
    merged = adapter("i", invocation=INVOCATION, merge_nbytes=10)
    engine.core.control(Merge(1, merged))
    engine.run()
    engine.submit(1, PROMPTS["in the middle"], 2, adapters=[merged])
    seen = []
    while not engine.core.idle:
        engine.step()
        assert engine.last is not None
        stats = engine.last.stats
        if stats.decode_rows + stats.prefill_tokens:
            seen.append((stats.base_rows, stats.distinct_adapters, stats.merged_rows))
    assert seen[0] == (1, 0, 0)
    assert set(seen[1:]) == {(0, 1, 1)}
    assert engine.tokens(1) == expected(PROMPTS["in the middle"], 2)


def test_an_adapter_that_replaces_it_under_traffic_has_its_own_invocation() -> None:
    engine = Engine(OracleRunner(num_slots=1))
    engine.submit(1, PROMPTS["several"], 8, adapters=[alora()])
    engine.step()
    engine.loader.finish()
    engine.step()
    engine.core.control(Unload(1, "sha256:i"))
    engine.submit(2, PROMPTS["several"], 4, adapters=[alora("k", invocation=[1])])
    engine.run()
    assert engine.tokens(1) == expected(PROMPTS["several"], 8)
    assert engine.tokens(2) == continuation(
        PROMPTS["several"], [("sha256:k", 1.0)], 4, active=invoked_at(PROMPTS["several"], [1])
    )


def test_the_last_occurrence_is_found_as_by_comparing_every_position() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(500):
        prompt = chance.choices([0, 1, 2, 1 << 24], k=chance.randrange(1, 30))
        invocation = chance.choices([0, 1, 2, 1 << 24], k=chance.randrange(1, 5))
        at = invoked_at(prompt, invocation)
        assert active_from(array("i", prompt), invocation) == (NEVER if at is None else at)
    assert active_from(array("i", [1, 2]), ()) == 0
