"""Answers of a least length: no end before it, and the same tokens whatever is beside them."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from engine import sampler_reference
from engine.driving import GREEDY, AheadEngine, Engine, adapter
from engine.oracle import OracleRunner, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.decoder.sampling import NativeSampling
from loraplex_model.ops import build
from loraplex_server.engine.batching.sampler import Draw, sample
from loraplex_server.engine.messages import SamplingParams
from loraplex_server.engine.runner.sampling import NativeSampler

PROMPT = [5, 6, 7]
PLAIN = continuation(PROMPT, [], 12)


@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize("least", range(8))
def test_no_token_ends_an_answer_before_its_least_length(least: int) -> None:
    """A stop token that comes up at places 2 and 5 ends the answer at the first that may."""
    ends = frozenset(
        [PLAIN[2], continuation(PROMPT, [], 6, ends=frozenset(PLAIN[2:3]), least=6)[5]]
    )
    engine = Engine()
    engine.submit(1, PROMPT, 12, stop_token_ids=sorted(ends), min_new_tokens=least, logprobs=2)
    engine.run()
    wanted = continuation(PROMPT, [], 12, ends=ends, least=least)
    at = next((i for i, token in enumerate(wanted) if token in ends), 12)
    assert at >= least
    assert engine.tokens(1) == wanted[:at]
    assert engine.outcome(1) == ("length" if at == 12 else "stop")
    # What is reported is the model's own opinion: the token that may not be chosen comes first.
    entries = [entry for output in engine.outputs[1] for entry in output.logprobs]
    for i, entry in enumerate(entries):
        assert entry.token_id == wanted[i]
        assert entry.top[0][0] == continuation([*PROMPT, *wanted[:i]], [], 1)[0]


@pytest.mark.usefixtures("pace")
def test_preemption_and_neighbours_change_nothing() -> None:
    ends = frozenset(PLAIN[1:2])
    wanted = continuation(PROMPT, [], 14, ends=ends, least=9)
    runner = OracleRunner(num_blocks=14, block_size=2)
    engine = Engine(runner, token_budget=8, max_running=4)
    engine.submit(9, [1, 2], 10, priority=1)
    for id in range(1, 5):
        one = [] if id % 2 else [adapter("a")]
        engine.submit(id, PROMPT, 14, stop_token_ids=[*ends], min_new_tokens=9, adapters=one)
    engine.run()
    assert engine.last is not None
    assert engine.last.stats.preemptions >= 1
    mix = [("sha256:a", 1.0)]
    other = continuation(PROMPT, mix, 14, ends=ends, least=9)
    for id in range(1, 5):
        assert engine.tokens(id) == (wanted if id % 2 else other)
    engine.core.check()


def test_the_device_chooses_again_once_the_answer_may_end() -> None:
    engine = AheadEngine()
    engine.submit(1, PROMPT, 12, stop_token_ids=[PLAIN[3]], min_new_tokens=6)
    engine.submit(2, [9], 12)
    engine.run()
    log = engine.device.log
    ahead = [
        launch
        for launch in range(2, engine.device.launches + 1)
        if log.index(f"launch {launch}") < log.index(f"read {launch - 1}")
    ]
    assert len(ahead) == engine.device.launches - 1  # the other request never waits
    assert engine.tokens(1) == continuation(PROMPT, [], 12, ends=frozenset(PLAIN[3:4]), least=6)
    assert engine.tokens(2) == continuation([9], [], 12)
    assert engine.device.launches == 12 + 6


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 100.0]),
    top_p=st.sampled_from([1.0, 0.9, 1e-6]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1e-37, 1.5, 100.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -2.0]),
    logit_bias=st.dictionaries(st.integers(0, 47), st.sampled_from([-100.0, 1.0, 100.0])),
    seed=st.integers(0, 2**64 - 1),
)


def native() -> NativeSampler | None:
    try:
        return NativeSampler(NativeSampling(build.load(), 1))
    except build.KernelsUnavailable:
        return None


NATIVE = native()


@settings(max_examples=300, deadline=None)
@given(
    params=SAMPLING,
    ends=st.lists(st.integers(0, 47), min_size=1, max_size=40),
    least=st.integers(0, 6),
    scale=st.sampled_from([1.0, 1e30, 3e38]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_choice_is_the_one_of_a_vocabulary_without_the_ends(
    params: SamplingParams, ends: list[int], least: int, scale: float, seed: int
) -> None:
    """Whatever the parameters, with numpy and by the kernels; later choices are the usual ones."""
    random = np.random.default_rng(seed)
    prompt = random.integers(0, 48, 5).tolist()
    draw = Draw(params, prompt, ends, least)
    output: list[int] = []
    for place in range(8):
        logits = (random.standard_normal((1, 48)) * scale).clip(-3e38, 3e38).astype(np.float32)
        logits[0, ends[0]] = logits.max()
        [token] = sample(logits, [draw])
        if NATIVE is not None:
            assert NATIVE.choose(logits, [0], [draw.address]) == [token]
        is_barred = place < least
        assert draw.is_biased() == (is_barred or bool(params.logit_bias))
        if is_barred:
            assert token not in ends
        bias = dict.fromkeys(ends, -np.inf) if is_barred else {}
        plain = msgspec.structs.replace(params, logit_bias={**params.logit_bias, **bias})
        assert token == sampler_reference.choose(plain, prompt, output, logits[0])
        output.append(token)
        draw.saw(token)


@pytest.mark.usefixtures("pace")
def test_greedy_choices_of_many_ends_take_the_best_that_is_left() -> None:
    first = PLAIN[0]
    left = [3, first + 1]
    engine = Engine()
    ends = [token for token in range(512) if token not in left]
    engine.submit(1, PROMPT, 1, stop_token_ids=ends, min_new_tokens=1, sampling=GREEDY)
    engine.submit(2, PROMPT, 1, stop_token_ids=ends, sampling=GREEDY)
    engine.run()
    assert engine.tokens(1) == [first + 1]
    assert (engine.tokens(2), engine.outcome(2)) == ([], "stop")
