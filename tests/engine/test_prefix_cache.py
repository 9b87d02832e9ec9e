"""Requests that begin alike share blocks, and only those whose keys and values are the same.

The oracle's blocks hold 4 tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner
from engine.prefixes import HEAD, alora, ask, engine_with, expected, order
from engine.test_ahead_machine import AheadMachine
from engine.test_machine import EngineMachine
from hypothesis import settings
from loraplex_server.engine.messages import AdapterRef, Merge, SamplingParams, Unload, Unmerge
from msgspec import structs


@pytest.mark.usefixtures("pace")
class TestBothPaces:
    def test_base_and_activated_adapters_share_in_both_directions(self) -> None:
        prompt = [*HEAD, 7, 8, 9]
        for first, second in (([], [alora("i")]), ([alora("i")], []), ([alora("i")], [alora("j")])):
            engine = engine_with()
            assert ask(engine, 1, prompt, *first) == 0
            assert ask(engine, 2, prompt, *second) == 8

    def test_an_adapter_finds_what_it_has_computed_itself_and_nothing_else(self) -> None:
        prompt = [*HEAD, 7, 8, *range(50, 60)]
        users: list[list[AdapterRef]] = [
            [],
            [adapter("a")],
            [adapter("a", 0.5)],
            [adapter("a", -0.5)],
            [adapter("b")],
            [adapter("a"), adapter("b")],
            [adapter("a", 0.5), adapter("b")],
            [adapter("a"), adapter("b", 0.5)],
            [alora("i")],
            [alora("i", 0.5)],
            [alora("j")],
            [adapter("v", virtual=3)],
            [adapter("w", virtual=4)],
        ]
        before_invocation = [[], *users[8:11]]
        for first in users:
            for second in users:
                engine = engine_with()
                ask(engine, 1, prompt, *first)
                shares_base = first in before_invocation and second in before_invocation
                found = 8 if shares_base else 0
                if first == second:
                    rest = 3 if first and first[0].digest == "sha256:v" else 0
                    found = (len(prompt) - 1 + rest) // 4 * 4 - rest
                assert ask(engine, 2, prompt, *second) == found, (first, second)

    def test_the_order_in_which_a_mix_is_written_does_not_matter(self) -> None:
        engine = engine_with()
        ask(engine, 1, HEAD, adapter("a", 0.5), adapter("b"))
        assert ask(engine, 2, HEAD, adapter("b"), adapter("a", 0.5)) == 8
        assert ask(engine, 3, HEAD, adapter("b"), adapter("a", 0.25), adapter("a", 0.25)) == 8

    @pytest.mark.parametrize("ref", [None, adapter("a"), alora("i")])
    def test_another_salt_finds_nothing(self, ref: AdapterRef | None) -> None:
        engine, refs = engine_with(), [ref] if ref else []
        prompt = [*HEAD[:6], 7, 8, 9]
        for id, salt in enumerate(("", "one", "two", "One", "one ")):
            assert ask(engine, id, prompt, *refs, salt=salt) == 0
            assert ask(engine, 10 + id, prompt, *refs, salt=salt) == 8

    @pytest.mark.parametrize("at", range(10))
    def test_a_block_that_holds_the_invocation_belongs_to_the_adapter(self, at: int) -> None:
        prompt = [*range(20, 20 + at), 7, 8, *range(40, 52 - at)]
        for first, second in (([], [alora("i")]), ([alora("i")], []), ([alora("i")], [alora("j")])):
            engine = engine_with()
            ask(engine, 1, prompt, *first)
            assert ask(engine, 2, prompt, *second) == at // 4 * 4

    def test_a_later_invocation_gives_the_tokens_before_it_to_the_base(self) -> None:
        """The first invocation does not act in the longer prompt, since the last one does."""
        engine = engine_with()
        short = [20, 21, 22, 23, 24, 7, 8, *range(40, 50)]
        ask(engine, 1, short, alora("i"))
        assert ask(engine, 2, [*short, 7, 8], alora("i")) == 4
        assert ask(engine, 3, [*short, 60], alora("i")) == 16

    def test_a_generated_invocation_does_not_act_and_one_in_the_prompt_does(self) -> None:
        """Both begin inside one block, which has the same tokens in both requests."""
        said = [7, 8, 60, 61, 62]
        engine = Engine(OracleRunner(block_size=8, scripts={50: said}))
        ref = alora("i")
        engine.submit(1, [1, 7, 8, 50], 6, adapters=[ref])
        engine.run()
        assert engine.tokens(1)[:5] == said
        for id, found in ((2, 0), (3, 8)):
            engine.submit(id, [1, 7, 8, 50, *said], 2, adapters=[ref])
            engine.run()
            assert engine.outputs[id][0].cached_tokens == found

    def test_one_token_is_always_computed(self) -> None:
        engine = engine_with()
        assert ask(engine, 1, HEAD[:8]) == 0
        assert ask(engine, 2, HEAD[:8]) == 4
        assert ask(engine, 3, HEAD[:9]) == 8

    def test_an_answer_is_part_of_the_next_prompt(self) -> None:
        """A conversation goes on, and an activated adapter judges it."""
        for refs in ([], [adapter("a")], [adapter("v", virtual=6)]):
            engine = engine_with()
            ask(engine, 1, HEAD, *refs, new=10)
            said = [*HEAD, *engine.tokens(1)]  # 21 tokens, of which the last was not computed
            found = 18 if refs and "virtual" in refs[0].path else 20
            assert ask(engine, 2, [*said, 90, 91], *refs) == found
            assert ask(engine, 3, [*said, 7, 8], alora("i")) == (0 if refs else 20)

    def test_a_prompt_without_the_invocation_is_the_bases_to_its_end(self) -> None:
        engine = engine_with()
        ask(engine, 1, [*HEAD, 40], alora("i"))
        assert ask(engine, 2, [*HEAD, 40, 41]) == 12

    def test_another_beginning_is_not_found(self) -> None:
        engine = engine_with()
        ask(engine, 1, HEAD)
        assert ask(engine, 2, [99, *HEAD[1:]]) == 0
        assert ask(engine, 3, [*HEAD[4:8], *HEAD[4:8], 1]) == 0  # a later block, first

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
        for at, refs in enumerate(([], [adapter("a")])):
            ask(engine, 10 * at, HEAD, *refs)
            assert ask(engine, 10 * at + 1, HEAD, *refs, new=10) == 0
            assert ask(engine, 10 * at + 2, HEAD, *refs, new=12) == 8
            assert ask(engine, 10 * at + 3, HEAD, *refs) == 8

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
            assert engine.tokens(id) == expected([*HEAD, id], [], 12 - 2 * id)
        engine.core.check()

    def test_kept_blocks_make_room_the_oldest_first(self) -> None:
        engine = engine_with(num_blocks=5)
        ask(engine, 1, HEAD)  # keeps 3 blocks, with the answer
        ask(engine, 2, [1] * 9)  # 3 blocks; keeps 2, in place of the oldest of the first
        assert engine.core._pool.free == 5
        assert engine.last is not None
        assert engine.last.stats.kept_blocks == 4
        assert ask(engine, 3, [1] * 9) == 8
        assert ask(engine, 4, [2] * 17) == 0
        assert ask(engine, 5, [1] * 9) == 0

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
        assert engine.tokens(3) == expected([*HEAD[:8], *[3] * 7], [], 2)
        assert engine.outputs[3][0].cached_tokens == 8

    @pytest.mark.parametrize("name", ["", "i", "a"])
    def test_a_preempted_request_finds_its_own_blocks_again(self, name: str) -> None:
        refs = {"": [], "i": [alora("i")], "a": [adapter("a")]}[name]
        engine = engine_with(num_blocks=9, max_running=2)
        first, second = [1, 2, 3, 4, 7, 8, 5], [2, 2, 3, 4, 7, 8, 5]
        engine.submit(1, first, 16, adapters=refs, priority=1)
        engine.submit(2, second, 16, adapters=refs)
        engine.run()
        assert engine.last is not None
        assert engine.last.stats.preemptions >= 1
        computed = sum(len(batch.tokens) for batch in engine.runner.batches)
        assert computed < 2 * 22 + engine.last.stats.preemptions * 8
        for id, prompt in ((1, first), (2, second)):
            assert engine.tokens(id) == expected(prompt, refs, 16)
            assert engine.outputs[id][0].cached_tokens == 0
        engine.core.check()

    def test_one_that_is_preempted_before_its_turn_computes_its_last_token_again(self) -> None:
        """Its blocks hold all of its tokens, and its next one is chosen from the last logits."""
        engine = engine_with(num_blocks=9)
        hostile = SamplingParams(temperature=50.0, top_p=0.5, seed=3)
        ids = (1, 2, 3)
        for id in ids:
            engine.submit(id, [id, *HEAD[:7]], 2, sampling=hostile)
        scheduler = engine.core._scheduler
        for _ in range(3):
            rows = scheduler.schedule(0.0)
            for row in rows:
                row.request.computed += row.count
                scheduler.settle(row)
            assert len(rows) == (3 if not _ else 0)
        scheduler._preempt(scheduler.running.pop())
        (row,) = scheduler.schedule(0.0)
        assert (row.request.id, row.start, row.count, row.completes) == (3, 4, 4, True)

    def test_merged_and_unmerged_rows_share_nothing(self) -> None:
        """Dense copies round otherwise, and those of another merge may too."""
        engine = engine_with()
        ref = adapter("a", merge_nbytes=10)
        ask(engine, 1, HEAD, ref)
        ask(engine, 2, HEAD, adapter("a", 0.5, merge_nbytes=10))
        order(engine, Merge(1, ref))
        assert ask(engine, 3, HEAD, ref) == 0
        assert ask(engine, 4, HEAD, ref) == 8
        assert ask(engine, 5, HEAD, adapter("a", 0.5, merge_nbytes=10)) == 8  # never by the copies
        order(engine, Unmerge(2, ref.digest))
        assert ask(engine, 6, HEAD, ref) == 8
        order(engine, Merge(3, ref))
        assert ask(engine, 7, HEAD, ref) == 0

    def test_a_merge_between_two_runs_of_a_request_lets_it_find_nothing(self) -> None:
        engine = engine_with()
        ref = adapter("a", merge_nbytes=10)
        engine.submit(1, HEAD, 6, adapters=[ref])
        for _ in range(4):
            while engine.loader.jobs:
                engine.loader.finish()
            engine.step()
        scheduler = engine.core._scheduler
        (request,) = scheduler.running
        scheduler.running.clear()
        scheduler._preempt(request)
        assert request.found
        request.copies.change(1)
        assert scheduler.prefixes.find(request) == []
        engine.run()
        assert engine.tokens(1) == expected(HEAD, [ref], 6)

    def test_a_request_that_a_merge_meets_keeps_nothing_from_then_on(self) -> None:
        engine = engine_with(token_budget=4, max_running=4)
        ref = adapter("a", merge_nbytes=10)
        ask(engine, 1, [1], ref)
        engine.submit(2, [*HEAD, *HEAD], 2, adapters=[ref])
        engine.step()
        order(engine, Merge(1, ref), steps=3)
        order(engine, Unmerge(2, ref.digest))
        assert engine.tokens(2) == expected([*HEAD, *HEAD], [ref], 2)
        assert 1 <= ask(engine, 3, [*HEAD, *HEAD], ref) <= 8

    def test_a_replaced_adapter_finds_nothing_and_one_that_comes_back_does(self) -> None:
        engine = engine_with()
        ask(engine, 1, HEAD, adapter("a"))
        order(engine, Unload(1, "sha256:a"))
        assert ask(engine, 2, HEAD, adapter("b")) == 0
        assert ask(engine, 3, HEAD, adapter("a")) == 8

    def test_a_failed_pass_leaves_nothing_to_share(self) -> None:
        engine = Engine(OracleRunner(fault_token=400))
        engine.submit(1, [*HEAD, 400], 2)
        engine.run()
        assert engine.outcome(1) == "ENGINE_FAULT"
        assert ask(engine, 2, HEAD) == 0

    @pytest.mark.parametrize("budget", [3, 512])
    @pytest.mark.parametrize("scored", [None, 1])
    def test_numbers_that_are_not_finite_leave_nothing_and_heal(
        self, budget: int, scored: int | None
    ) -> None:
        engine = Engine(OracleRunner(nonfinite_token=400), token_budget=budget, max_running=3)
        ask(engine, 1, HEAD)
        engine.submit(2, [*HEAD[:8], 1, 2, 3, 4, 400, 5], 2, prompt_logprobs=scored)
        engine.run()
        assert engine.outcome(2) == "NON_FINITE_LOGITS"
        assert engine.core._pool.kept == 0
        assert ask(engine, 3, HEAD) == 0

    def test_one_that_shares_with_a_poisoned_request_goes_on_and_keeps_nothing(self) -> None:
        engine = Engine(OracleRunner(nonfinite_token=400), token_budget=8, max_running=3)
        engine.submit(1, HEAD, 20)
        engine.step()
        engine.submit(2, [*HEAD[:8], 1, 2, 3, 4, 5, 400], 2)
        engine.run()
        assert engine.outcome(2) == "NON_FINITE_LOGITS"
        assert engine.tokens(1) == expected(HEAD, [], 20)
        assert engine.core._pool.kept == 0
        engine.core.check()

    def test_what_nobody_vouches_for_goes_with_its_request(self) -> None:
        """Whether the numbers of a prompt are finite is seen at its end, which is not reached."""
        engine = Engine(token_budget=4, max_running=4)
        engine.submit(1, [*HEAD, *HEAD], 2)
        for _ in range(4):
            engine.step()
        assert engine.core._pool.kept >= 2
        engine.core.abort(1)
        engine.run()
        assert engine.core._pool.kept == 0
        engine.core.check()

    def test_without_the_setting_nothing_is_kept(self) -> None:
        engine = Engine(prefix_cache=False)
        for id in (1, 2):
            assert ask(engine, id, HEAD) == 0
        assert engine.core._pool.kept == 0

    def test_use_is_counted(self) -> None:
        engine = engine_with(num_blocks=6)
        ask(engine, 1, HEAD)
        ask(engine, 2, HEAD)
        ask(engine, 3, [9] * 20)
        assert engine.last is not None
        stats = engine.last.stats
        assert (stats.prefix_lookups, stats.prefix_hits) == (3, 1)
        # 3 blocks of the first, one more of the second; the third needs all 6 and keeps 5.
        assert (stats.kept_blocks, stats.prefix_evictions) == (5, 3)
        assert (stats.free_blocks, stats.used_blocks) == (6, 0)

    def test_roots_do_not_pile_up(self) -> None:
        engine = engine_with(num_blocks=6)
        for id in range(20):
            ask(engine, id, HEAD, salt=str(id))
        assert len(engine.core._scheduler.prefixes._tree._roots) <= 2


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
