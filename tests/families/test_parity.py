"""Every family in every form of checkpoint gives transformers' logits on the same NF4 weights.

`make test-families` runs these tests, and reports the largest difference and the families.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import forms, variants
from loraplex_model.base.families import FAMILIES
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import Logprobs, Output, SamplingParams, StepReport, Submit
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner
from loraplex_server.engine.runner.local import build as start
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids
from transformers import PreTrainedModel

pytestmark = pytest.mark.slow

NEAR = 1e-4
"""Largest difference of a logit."""

LONG, SHORT = 40, 20
"""Lengths of two sequences, on both sides of `short_positions` and longer than any window."""

REQUESTS = ((26, 14), (12, 10), (20, 20))
"""Tokens of the prompt and of the answer; the second is short in the same sense."""

KV_TOKENS = 64
"""Too few for the requests together."""

Way = Callable[[Driver, Sequence, Sequence], None]


def whole(driver: Driver, long: Sequence, short: Sequence) -> None:
    driver.step((long, LONG), (short, SHORT))


def chunked(driver: Driver, long: Sequence, short: Sequence) -> None:
    driver.step((long, 13), (short, 7))
    driver.step((short, 12), (long, 3))
    driver.step((long, 24), (short, 1))


def token_by_token(driver: Driver, long: Sequence, short: Sequence) -> None:
    for step in range(LONG):
        driver.step((long, 1), *[(short, 1)] * (step < SHORT))


def resumed(driver: Driver, long: Sequence, short: Sequence) -> None:
    driver.step((long, 30), (short, 10))
    driver.step((long, 1), (short, 1))
    driver.preempt(long)
    driver.step((short, 9), (long, 32))
    driver.step((long, 8))


WAYS: tuple[Way, ...] = (whole, chunked, token_by_token, resumed)


def by_decoders(weights: Any, model: PreTrainedModel) -> float:
    """The largest difference of a logit, over both decoders on the CPU and all ways."""
    limit = weights.config.short_positions or LONG
    ids = token_ids(1, LONG, variants.VOCAB), token_ids(2, SHORT, variants.VOCAB)
    expected = [forms.logits(model, each) for each in ids]
    found = 0.0
    for decoder in (
        ReferenceDecoder(weights, NUM_BLOCKS, BLOCK_SIZE, 1, keep_dense=True),
        NativeDecoder(weights, NUM_BLOCKS, BLOCK_SIZE, 1, threads=1),
    ):
        for seed, way in enumerate(WAYS):
            sequences = [Sequence(list(each), is_long=len(each) > limit) for each in ids]
            way(Driver(decoder, seed), *sequences)
            for sequence, wanted in zip(sequences, expected, strict=True):
                found = max(found, _distance(torch.cat(sequence.logits), wanted))
    return found


def by_engine(runner: LocalRunner, model: PreTrainedModel) -> float:
    """The largest difference of a log-probability, over prompts and answers of the engine.

    Prompts are computed in chunks among tokens of answers, and requests are preempted.
    """
    core = EngineCore(runner, EngineLimits(token_budget=16, max_running=3))
    prompts = [token_ids(5 + i, prompt, variants.VOCAB) for i, (prompt, _) in enumerate(REQUESTS)]
    scores = {"logprobs": variants.VOCAB, "prompt_logprobs": variants.VOCAB}
    for i, (prompt, (_, new)) in enumerate(zip(prompts, REQUESTS, strict=True)):
        core.add(Submit(i, prompt, new, sampling=SamplingParams(temperature=0.0), **scores))
    outputs: dict[int, list[Output]] = {i: [] for i in range(len(prompts))}
    preemptions = 0
    while not all(parts and parts[-1].finish for parts in outputs.values()):
        for message in core.step():
            if isinstance(message, StepReport):
                preemptions = message.stats.preemptions
                for output in message.outputs:
                    assert output.error is None
                    outputs[output.id].append(output)
    assert preemptions
    core.check()
    return max(_request(prompts[i], parts, model) for i, parts in outputs.items())


def _request(prompt: list[int], parts: list[Output], model: PreTrainedModel) -> float:
    answer = [token for part in parts for token in part.token_ids]
    expected = forms.logits(model, [*prompt, *answer[:-1]]).log_softmax(-1)
    scores = [score for part in parts for score in (*part.prompt_logprobs, *part.logprobs)]
    assert [score.token_id for score in scores] == [*prompt[1:], *answer]
    assert torch.equal(expected[len(prompt) - 1 :].argmax(-1), torch.tensor(answer))
    return _distance(torch.stack([_row(score) for score in scores]), expected)


def _row(score: Logprobs) -> torch.Tensor:
    assert len(score.top) == variants.VOCAB
    return torch.tensor([value for _, value in sorted(score.top)])


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return float((found - expected).abs().max())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("form", "variant"), forms.cases())
def test_logits_equal_transformers(
    form: str, variant: str, tmp_path: Path, cache: Path, record_property: Any
) -> None:
    model = forms.build(form, variant)
    record_property("family", forms.family(model))
    path = str(forms.write(form, model, tmp_path / "model"))
    model = variants.rounded(model)
    decoders = by_decoders(load_base(path, torch.float32, cache).weights, model)
    settings: dict[str, Any] = {"max_rank": 8, "adapter_memory": 1 << 20, "threads": 1}
    config = RunnerConfig(
        model=path,
        dtype="float32",
        device="cpu",
        cache=str(cache),
        max_context=0,
        kv_tokens=KV_TOKENS,
        kv_memory=0,
        **settings,
    )
    difference = max(decoders, by_engine(start(config), model))
    record_property("difference", difference)
    assert difference <= NEAR


def test_every_family_has_a_case() -> None:
    shown = {forms.family(forms.build(*case)) for case in forms.cases()}
    assert shown == {*FAMILIES}
