"""An engine whose runner has a sampler of its own answers as one that samples with numpy."""

from __future__ import annotations

import numpy as np
import pytest
from engine.driving import GREEDY, Engine
from engine.oracle import OracleRunner
from loraplex_model.decoder.sampling import NativeSampling
from loraplex_model.ops import build
from loraplex_server.engine.messages import Output, SamplingParams
from loraplex_server.engine.runner.sampling import NativeSampler


def engine_with_kernels() -> Engine:
    try:
        library = build.load()
    except build.KernelsUnavailable as reason:
        pytest.skip(str(reason))
    runner = OracleRunner()
    runner.sampler = NativeSampler(NativeSampling(library, 1))
    return Engine(runner)


def submit_all(engine: Engine) -> None:
    """Greedy, sampled, penalised and costly requests, with log-probabilities and without."""
    engine.submit(1, [3, 4, 5], 6, logprobs=3, prompt_logprobs=2)
    engine.submit(2, [8], 9, sampling=SamplingParams(temperature=0.7, top_p=0.95, seed=3))
    engine.submit(3, [9] * 20, 9, sampling=SamplingParams(temperature=100.0, top_p=0.999, seed=5))
    penalties = SamplingParams(
        temperature=2.0, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={3: 9.0}, seed=1
    )
    engine.submit(4, [5, 6], 30, sampling=penalties, logprobs=0)
    engine.submit(5, [7] * 9, 2, sampling=GREEDY, logprobs=10_000)


def answers(engine: Engine) -> dict[int, list[Output]]:
    submit_all(engine)
    engine.run()
    return engine.outputs


def test_outputs_equal_those_of_numpy() -> None:
    expected = answers(Engine())
    actual = answers(engine_with_kernels())
    assert actual.keys() == expected.keys() == set(range(1, 6))
    for id, outputs in expected.items():
        assert [o.token_ids for o in actual[id]] == [o.token_ids for o in outputs]
        assert [o.finish for o in actual[id]] == [o.finish for o in outputs]
        for ours, theirs in zip(actual[id], outputs, strict=True):
            for kind in ("logprobs", "prompt_logprobs"):
                mine, other = getattr(ours, kind), getattr(theirs, kind)
                assert [(e.token_id, len(e.top)) for e in mine] == [
                    (e.token_id, len(e.top)) for e in other
                ]
                np.testing.assert_allclose(
                    [e.logprob for e in mine], [e.logprob for e in other], rtol=1e-5, atol=2e-6
                )


def test_costly_rows_do_not_take_turns() -> None:
    engine = engine_with_kernels()
    submit_all(engine)
    for _ in range(4):
        engine.step()
        assert len(engine.core._scheduler.turns) == 0
    assert len(engine.tokens(3)) == len(engine.tokens(2)) > 1


def test_a_row_that_is_not_finite_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with_kernels()
    forward = engine.runner.forward

    def broken(batch: object) -> np.ndarray:
        logits = forward(batch)  # type: ignore[arg-type]
        logits[0, 3] = np.nan
        return logits

    engine.submit(1, [3], 6)
    engine.submit(2, [4], 6)
    monkeypatch.setattr(engine.runner, "forward", broken)
    engine.step()
    monkeypatch.undo()
    engine.run()
    assert sorted(str(engine.outcome(id)) for id in (1, 2)) == ["NON_FINITE_LOGITS", "length"]
