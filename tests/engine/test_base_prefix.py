"""Keys and values of the base are shared by prompts that begin alike; those of adapters never are.

The oracle's blocks hold 4 tokens. `computed` counts the tokens that passes have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation, invoked_at
from engine.test_ahead_machine import AheadMachine
from engine.test_machine import EngineMachine
from hypothesis import settings
from loraplex_server.engine.batching.kv import BlockPool
from loraplex_server.engine.messages import AdapterRef, Merge, Unload
from msgspec import structs

HEAD = list(range(20, 31))  # 11 tokens: two full blocks
INVOCATION = [7, 8]


def engine_with(num_blocks: int = 40, **limits: int) -> Engine:
    runner = OracleRunner(num_blocks=num_blocks, merge_budget_bytes=100)
    return Engine(runner, share_base_prefixes=True, **limits)


def alora(name: str, weight: float = 1.0, **options: Any) -> AdapterRef:
    return adapter(name, weight, invocation=INVOCATION, **options)


def ask(engine: Engine, id: int, prompt: list[int], *refs: AdapterRef, new: int = 3) -> int:
    """Answers a request, which must be right; returns how many tokens were computed for it."""
    before = len(engine.runner.batches)
    engine.submit(id, prompt, new, adapters=list(refs))
    engine.run()
    is_activated = any("invocation" in ref.path for ref in refs)
    active = invoked_at(prompt, INVOCATION) if is_activated else 0
    mix = [(ref.digest, ref.weight) for ref in refs]
    assert engine.tokens(id) == continuation(prompt, mix, new, active=active)
    engine.core.check()
    computed = sum(len(batch.tokens) for batch in engine.runner.batches[before:])
    assert len(prompt) + new - 1 - computed == engine.outputs[id][0].cached_tokens
    return computed


@pytest.mark.usefixtures("pace")
class TestBothPaces:
    def test_base_and_activated_adapters_share_in_both_directions(self) -> None:
        prompt = [*HEAD, 7, 8, 9]
        for first, second in (([], [alora("i")]), ([alora("i")], []), ([alora("i")], [alora("j")])):
            engine = engine_with()
            assert ask(engine, 1, prompt, *first) == len(prompt) + 2
            assert ask(engine, 2, prompt, *second) == len(prompt) + 2 - 8

    def test_what_an_adapter_has_computed_is_shared_with_nobody(self) -> None:
        prompt = [*HEAD, 7, 8, *range(50, 60)]
        for first in (alora("i"), alora("i", 0.5), adapter("lora")):
            for second in ([alora("i")], [alora("j")], [adapter("lora")], []):
                engine = engine_with()
                ask(engine, 1, prompt, first)
                most = 8 if "invocation" in first.path else 0
                if second and "invocation" not in second[0].path:
                    most = 0
                assert ask(engine, 2, prompt, *second) == len(prompt) + 2 - most

    @pytest.mark.parametrize("at", range(10))
    def test_a_block_that_holds_the_invocation_belongs_to_the_adapter(self, at: int) -> None:
        prompt = [*range(20, 20 + at), 7, 8, *range(40, 52 - at)]
        engine = engine_with()
        ask(engine, 1, prompt)
        assert ask(engine, 2, prompt, alora("i")) == len(prompt) + 2 - at // 4 * 4
        engine = engine_with()
        ask(engine, 1, prompt, alora("i"))
        assert ask(engine, 2, prompt) == len(prompt) + 2 - at // 4 * 4

    def test_one_token_is_always_computed(self) -> None:
        engine = engine_with()
        assert ask(engine, 1, HEAD[:8]) == 10
        assert ask(engine, 2, HEAD[:8]) == 10 - 4
        assert ask(engine, 3, HEAD[:9]) == 11 - 8

    def test_an_answer_is_part_of_the_next_prompt(self) -> None:
        """A conversation goes on, and an activated adapter judges it."""
        engine = engine_with()
        ask(engine, 1, HEAD, new=10)
        said = [*HEAD, *engine.tokens(1)]  # 21 tokens, of which the last was not computed
        assert ask(engine, 2, [*said, 90, 91]) == 23 + 2 - 20
        assert ask(engine, 3, [*said, 7, 8], alora("i")) == 23 + 2 - 20

    def test_a_prompt_without_the_invocation_is_the_bases_to_its_end(self) -> None:
        engine = engine_with()
        ask(engine, 1, [*HEAD, 40], alora("i"))
        assert ask(engine, 2, [*HEAD, 40, 41]) == 13 + 2 - 12

    def test_another_beginning_is_not_found(self) -> None:
        engine = engine_with()
        ask(engine, 1, HEAD)
        assert ask(engine, 2, [99, *HEAD[1:]]) == 13
        assert ask(engine, 3, [*HEAD[4:8], *HEAD[4:8], 1]) == 11  # a later block, first

    def test_prompt_logprobs_need_every_token(self) -> None:
        engine = engine_with()
        ask(engine, 1, HEAD)
        engine.submit(2, HEAD, 2, prompt_logprobs=1)
        engine.run()
        assert [entry.token_id for entry in engine.outputs[2][0].prompt_logprobs] == HEAD[1:]
        assert engine.outputs[2][0].cached_tokens == 0

    def test_long_and_short_sequences_share_nothing(self) -> None:
        """A base with LongRoPE rotates all keys of a sequence that will be long otherwise."""
        engine = engine_with()
        info = engine.runner.info
        config = replace(info.base.config, short_positions=16)
        engine.runner.info = structs.replace(info, base=replace(info.base, config=config))
        ask(engine, 1, HEAD)
        assert ask(engine, 2, HEAD, new=10) == 20
        assert ask(engine, 3, HEAD, new=12) == 22 - 8
        assert ask(engine, 4, HEAD) == 13 - 8

    def test_running_requests_share_blocks_and_each_frees_its_own(self) -> None:
        engine = engine_with()
        ask(engine, 1, HEAD)
        for id in (2, 3, 4):
            engine.submit(id, [*HEAD, id], 12 - 2 * id)
        engine.step()
        pool = engine.core._pool
        tables = [r.blocks[:2].tolist() for r in engine.core._requests.values()]
        assert tables[0] == tables[1] == tables[2]
        assert pool.owners(tables[0][0]) == 3
        assert pool.used == 2 + 3 * 1
        engine.core.abort(3)
        engine.run()
        for id in (2, 4):
            assert engine.tokens(id) == continuation([*HEAD, id], [], 12 - 2 * id)
        engine.core.check()

    def test_kept_blocks_make_room_the_oldest_first(self) -> None:
        engine = engine_with(num_blocks=5)
        ask(engine, 1, HEAD)  # keeps 3 blocks, with the answer
        ask(engine, 2, [1] * 9)  # 3 blocks; keeps 2, in place of the oldest of the first
        assert engine.core._pool.free == 5
        assert ask(engine, 3, [1] * 9) == 9 + 2 - 8
        assert ask(engine, 4, [2] * 17) == 17 + 2
        assert ask(engine, 5, [1] * 9) == 9 + 2

    def test_kept_blocks_that_nobody_owns_are_part_of_the_need(self) -> None:
        """3 of 6 blocks are in use, and of the other 3 the waiting request would find 2."""
        engine = engine_with(num_blocks=6)
        ask(engine, 1, HEAD[:9], new=1)
        engine.submit(2, [1] * 9, 3)
        engine.step()
        engine.submit(3, [*HEAD[:8], *[3] * 7], 2)
        engine.step()
        assert len(engine.core._scheduler.running) == 1
        engine.run()
        assert engine.tokens(3) == continuation([*HEAD[:8], *[3] * 7], [], 2)
        assert engine.outputs[3][0].cached_tokens == 8

    def test_a_preempted_request_finds_its_own_blocks_again(self) -> None:
        engine = engine_with(num_blocks=7, max_running=2)
        prompt = [1, 2, 3, 4, 7, 8, 5]
        engine.submit(1, prompt, 14, adapters=[alora("i")], priority=1)
        engine.submit(2, prompt, 12, adapters=[alora("i")])
        engine.run()
        assert engine.last is not None
        assert engine.last.stats.preemptions >= 1
        for id, new in ((1, 14), (2, 12)):
            assert engine.tokens(id) == continuation(prompt, [("sha256:i", 1.0)], new, active=4)
        engine.core.check()

    def test_replacing_and_merging_an_adapter_leaves_nothing_of_it(self) -> None:
        prompt = [*HEAD, 7, 8, 9]
        engine = engine_with()
        ref = alora("i", merge_nbytes=10)
        ask(engine, 1, prompt, ref)
        engine.core.control(Merge(1, ref))
        engine.run()
        assert ask(engine, 2, prompt, ref) == len(prompt) + 2 - 8
        engine.core.control(Unload(2, ref.digest))
        engine.run()
        assert ask(engine, 3, prompt, alora("k")) == len(prompt) + 2 - 8

    def test_a_failed_pass_leaves_nothing_to_share(self) -> None:
        runner = OracleRunner(fault_token=400)
        engine = Engine(runner, share_base_prefixes=True)
        engine.submit(1, [*HEAD, 400], 2)
        engine.run()
        assert engine.outcome(1) == "ENGINE_FAULT"
        assert ask(engine, 2, HEAD) == 13

    def test_without_the_setting_nothing_is_kept(self) -> None:
        engine = Engine()
        for id in (1, 2):
            assert ask(engine, id, HEAD) == 13


class SharingMachine(EngineMachine):
    """Requests of the base and of activated adapters share blocks."""

    shares = True


class SharingAheadMachine(AheadMachine):
    """The same, one step ahead."""

    shares = True


for _machine in (SharingMachine, SharingAheadMachine):
    _machine.TestCase.settings = settings(EngineMachine.TestCase.settings, max_examples=80)
TestSharedBlocksAreNeverWrong = SharingMachine.TestCase
TestSharedBlocksOfAnEngineThatWorksAheadAreNeverWrong = SharingAheadMachine.TestCase


MISTAKES: dict[str, Callable[[BlockPool, int], object]] = {
    "freed while it is used": lambda pool, block: pool.release([block, block]),
    "kept twice": lambda pool, block: pool.keep(block, b"other"),
    "shared without being kept": lambda pool, _: pool.share(pool.reserve(1)[0]),
    "kept while it is free": lambda pool, _: pool.keep(7, b"other"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_with_kept_blocks_is_noticed(mistake: Callable[[BlockPool, int], object]) -> None:
    pool = BlockPool(8, 4)
    (block,) = pool.reserve(1)
    pool.keep(block, b"key")
    pool.check()
    with pytest.raises(AssertionError):
        mistake(pool, block)


def test_a_kept_block_is_found_until_it_is_reserved() -> None:
    pool = BlockPool(3, 4)
    one, two = pool.reserve(2)
    pool.keep(one, b"one")
    pool.keep(two, b"one")  # the same content: not kept
    pool.release([one, two])
    assert (pool.find(b"one"), pool.free, pool.used) == (one, 3, 0)
    pool.share(one)
    assert (pool.owners(one), pool.free) == (1, 2)
    assert one not in pool.reserve(2)
    pool.release([one])
    assert pool.reserve(1) == [one]
    assert pool.find(b"one") is None
    pool.check()
