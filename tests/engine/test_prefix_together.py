"""Requests with one prompt that arrive together compute it once, and none holds up another."""

from __future__ import annotations

import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner
from engine.prefixes import HEAD, alora, ask, engine_with, expected
from loraplex_server.engine.messages import SamplingParams, Submit
from msgspec import structs


@pytest.mark.usefixtures("pace")
class TestTogether:
    """Several requests with one prompt, as for several samples of it."""

    def computed(self, engine: Engine) -> int:
        return sum(len(batch.tokens) for batch in engine.runner.batches)

    @pytest.mark.parametrize("budget", [4, 7, 16, 512])
    @pytest.mark.parametrize("name", ["", "a", "i", "v"])
    def test_they_compute_it_once(self, name: str, budget: int) -> None:
        refs = {
            "": [],
            "a": [adapter("a")],
            "i": [alora("i")],
            "v": [adapter("v", virtual=3)],
        }[name]
        runner = OracleRunner(num_blocks=100, prefix_blocks=4)
        engine = Engine(runner, token_budget=budget, max_running=4)
        engine.core.add(Submit(0, [1], 1, refs))  # the adapter is there
        engine.run()
        runner.batches.clear()
        prompt = [*range(20, 40), 7, 8, *range(40, 51)]  # 33 tokens
        for id in range(1, 5):
            engine.submit(id, prompt, 2 + id, adapters=refs)
        engine.run()
        rest = 3 if name == "v" else 0
        shared = (32 + rest) // 4 * 4 - rest
        assert self.computed(engine) == 33 + 3 * (33 - shared) + sum(1 + id for id in range(1, 5))
        for id in range(1, 5):
            assert engine.tokens(id) == expected(prompt, refs, 2 + id)
            assert engine.outputs[id][0].cached_tokens == (0 if id == 1 else shared)
        assert engine.last is not None
        assert engine.last.stats.prefix_hits == 3
        engine.core.check()

    def test_what_a_preempted_request_has_computed_itself_is_not_counted(self) -> None:
        engine = engine_with(token_budget=16, max_running=4)
        for id in (1, 2, 3):
            engine.submit(id, HEAD, 2)
        engine.step()
        engine.core._requests[2].runs = 2  # as after a preemption
        engine.run()
        assert [engine.outputs[id][0].cached_tokens for id in (1, 2, 3)] == [0, 0, 8]

    def test_another_prompt_is_computed_meanwhile(self) -> None:
        engine = engine_with(token_budget=8, max_running=8)
        engine.submit(1, [*HEAD[:6], 1], 2)
        engine.submit(2, [*HEAD[:6], 2], 2)
        engine.submit(3, [9, 9, 9], 2)
        engine.step()
        assert [len(batch.tokens) for batch in engine.runner.batches[-1:]] in ([8], [])
        scheduled = {r.id for r in engine.core._requests.values() if r.computed}
        assert scheduled == {1, 3}
        engine.run()
        for id, prompt in ((1, [*HEAD[:6], 1]), (2, [*HEAD[:6], 2]), (3, [9, 9, 9])):
            assert engine.tokens(id) == expected(prompt, [], 2)

    @pytest.mark.parametrize("after", range(5))
    @pytest.mark.parametrize("ends", [(1,), (1, 2), (2,), (1, 3)])
    def test_the_end_of_one_holds_up_nobody(self, after: int, ends: tuple[int, ...]) -> None:
        engine = engine_with(token_budget=5, max_running=4)
        prompt = list(range(20, 41))
        for id in (1, 2, 3, 4):
            engine.submit(id, prompt, 3)
        for _ in range(after):
            engine.step()
        for id in ends:
            engine.core.abort(id)
        engine.run(most=40)
        for id in {1, 2, 3, 4} - set(ends):
            assert engine.tokens(id) == expected(prompt, [], 3)
        engine.core.check()

    def test_one_that_scores_its_prompt_computes_all_of_it_and_holds_up_nobody(self) -> None:
        engine = engine_with(token_budget=16, max_running=4, prompt_logprob_rows=1)
        engine.submit(1, HEAD, 2, prompt_logprobs=0)
        engine.submit(2, HEAD, 2)
        for _ in range(4):
            engine.step()
        assert engine.outcome(2) == "length"
        engine.run()
        assert engine.outputs[1][0].cached_tokens == engine.outputs[2][0].cached_tokens == 0
        assert [entry.token_id for entry in engine.outputs[1][0].prompt_logprobs] == HEAD[1:]
        engine.core.check()

    def test_a_lack_of_device_memory_while_others_wait(self) -> None:
        engine = engine_with(token_budget=16, max_running=4)
        engine.runner.out_of_memory = 3
        for id in (1, 2, 3):
            engine.submit(id, [*HEAD, id], 3)
        for _ in range(6):
            engine.step()
        engine.run()
        for id in (1, 2, 3):
            if engine.outcome(id) == "length":
                assert engine.tokens(id) == expected([*HEAD, id], [], 3)
        assert ask(engine, 4, HEAD) in (0, 8)

    def test_samples_of_one_prompt_are_those_of_requests_alone(self) -> None:
        params = SamplingParams(temperature=1.5, seed=5)

        def samples(engine: Engine, ids: list[int]) -> list[list[int]]:
            for id in ids:
                engine.submit(id, HEAD, 6, sampling=structs.replace(params, seed=id))
            engine.run()
            return [engine.tokens(id) for id in ids]

        alone = [samples(Engine(prefix_cache=False), [id])[0] for id in (1, 2, 3)]
        assert samples(engine_with(), [1, 2, 3]) == alone
        assert len(set(map(tuple, alone))) > 1
