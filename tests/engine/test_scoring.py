"""Requests for no tokens: the prompt is computed and scored, and nothing is generated."""

from __future__ import annotations

import numpy as np
import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner, continuation
from engine.test_least_length import NATIVE
from loraplex.v1 import generation_pb2
from loraplex_server.engine.messages import SamplingParams
from loraplex_server.engine.passes.choices import Choices

pytestmark = pytest.mark.usefixtures("pace")

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def scored(engine: Engine, id: int) -> list[tuple[int, float]]:
    return [(e.token_id, e.logprob) for o in engine.outputs[id] for e in o.prompt_logprobs]


def test_the_scores_are_those_of_a_request_that_generates() -> None:
    engine = Engine()
    engine.submit(1, PROMPT, 0, prompt_logprobs=2)
    engine.submit(2, PROMPT, 3, prompt_logprobs=2)
    engine.run()
    assert scored(engine, 1) == scored(engine, 2)
    assert [token for token, _ in scored(engine, 1)] == PROMPT[1:]
    (output,) = engine.outputs[1]
    assert (output.token_ids, output.logprobs, output.finish) == ([], [], "length")
    assert output.started
    assert output.stop_token is None
    engine.core.check()


def test_nothing_else_of_the_request_matters() -> None:
    """An end token, log-probabilities of new tokens and sampling have no token to act on."""
    first = continuation(PROMPT, [], 1)[0]
    engine = Engine()
    engine.submit(1, PROMPT, 0, stop_token_ids=[first], logprobs=5, min_new_tokens=0)
    engine.submit(2, PROMPT, 0, sampling=SamplingParams(temperature=9.0, top_p=0.5, seed=1))
    engine.submit(3, [4], 0, prompt_logprobs=0)
    engine.run()
    for id in (1, 2, 3):
        (output,) = engine.outputs[id]
        assert (output.token_ids, output.logprobs, output.finish) == ([], [], "length")
        assert output.stop_token is None
        assert output.prompt_logprobs == []


def test_the_prompt_stays_in_the_cache() -> None:
    engine = Engine(OracleRunner(block_size=2))
    engine.submit(1, PROMPT, 0)
    engine.run()
    engine.submit(2, PROMPT, 2)
    engine.run()
    assert engine.outputs[2][0].cached_tokens == 6
    assert engine.tokens(2) == continuation(PROMPT, [], 2)


def test_logits_that_are_not_finite_fail_the_request() -> None:
    engine = Engine(OracleRunner(nonfinite_token=7))
    engine.submit(1, PROMPT, 0)
    engine.submit(2, PROMPT, 0, prompt_logprobs=0)
    engine.submit(3, PROMPT[:2], 0, prompt_logprobs=0)
    engine.run()
    assert [engine.outcome(id) for id in (1, 2, 3)] == ["NON_FINITE_LOGITS"] * 2 + ["length"]
    engine.core.check()


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_preemption_scores_each_token_once(rows: int) -> None:
    runner = OracleRunner(num_blocks=8, block_size=2)
    engine = Engine(runner, token_budget=4, max_running=4, prompt_logprob_rows=rows)
    engine.submit(1, [1, 1], 12, priority=1)
    engine.submit(2, PROMPT, 0, prompt_logprobs=1, adapters=[adapter("a")])
    engine.submit(3, PROMPT, 5)
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions >= 1
    alone = Engine()
    alone.submit(2, PROMPT, 0, prompt_logprobs=1, adapters=[adapter("a")])
    alone.run()
    assert scored(engine, 2) == scored(alone, 2)
    assert engine.tokens(3) == continuation(PROMPT, [], 5)
    engine.core.check()


def test_a_prompt_that_fills_the_cache_is_computed_and_a_longer_one_is_refused() -> None:
    engine = Engine(OracleRunner(num_blocks=4, block_size=2))
    engine.submit(1, list(range(1, 9)), 0, prompt_logprobs=0)
    engine.submit(2, list(range(1, 10)), 0, prompt_logprobs=0)
    engine.run()
    assert [engine.outcome(id) for id in (1, 2)] == ["length", "PROMPT_TOO_LONG"]
    assert len(scored(engine, 1)) == 7
    engine.core.check()


@pytest.mark.parametrize("kernels", [False, True])
def test_a_tokens_value_and_the_one_among_the_best_are_the_same_float(kernels: bool) -> None:
    """Evaluations compare the two with ==, and with the largest: ties and huge logits included."""
    choices = Choices(NATIVE if kernels else None)
    if kernels and NATIVE is None:
        pytest.skip("no kernels")
    random = np.random.default_rng(1)
    for scale in (1e-3, 1.0, 30.0, 1e4, 1e30):
        logits = (random.standard_normal((40, 300)) * scale).astype(np.float32)
        logits[1] = 0.5
        logits[2, 7:20] = logits[2].max()
        for token in (0, 7, 150, 299):
            tokens = [token if row % 2 else int(logits[row].argmax()) for row in range(40)]
            for entry in choices.logprobs(logits, range(40), tokens, [300] * 40):
                values = dict(entry.top)
                assert entry.logprob == values[entry.token_id]
                assert max(values.values()) == entry.top[0][1]
                wire = generation_pb2.TokenLogprob(logprob=entry.logprob).logprob
                assert wire == generation_pb2.TokenLogprob(logprob=values[entry.token_id]).logprob
                assert wire == entry.logprob  # it is a float32 already
            best = choices.logprobs(logits, [3], [int(logits[3].argmax())], [1])[0]
            assert best.logprob == best.top[0][1]
