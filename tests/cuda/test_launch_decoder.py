"""Passes that are launched one ahead, on the decoder for CUDA in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.cuda.decoder import CudaDecoder
from loraplex_model.decoder.cuda.step.tickets import HostRoom
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.sampler import Draw, uniform
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import SamplingParams, StepReport, Submit
from loraplex_server.engine.runner import local
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner
from loraplex_server.engine.runner.protocol import AheadRunner, DrawOrder, works_ahead

from model import tiny

PROMPTS = [[3, 17, 9], [40, 41, 42, 43, 44], [77]]
PARAMS = [
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(temperature=1.5, top_p=0.9, seed=5),
    SamplingParams(temperature=0.9, top_k=30, frequency_penalty=1.5, presence_penalty=0.5, seed=6),
]
BLOCKS = 2
"""KV blocks of a sequence."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> LocalRunner:
    directory = tmp_path_factory.mktemp("launch")

    def open_decoder(weights, num_blocks, num_slots, *, max_positions, **_):
        return CudaDecoder(
            weights,
            num_blocks,
            16,
            num_slots,
            max_positions=max_positions,
            max_rows=16,
            max_draws=8,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "open_decoder", open_decoder)
        return local.build(
            RunnerConfig(
                model=str(tiny.write("llama", directory / "model")),
                dtype="float32",
                device="cpu",
                threads=1,
                cache=str(directory / "cache"),
                max_context=0,
                kv_tokens=256,
                kv_memory=0,
                adapter_memory=1 << 20,
                max_rank=16,
            )
        )


def rows_of(ids: list[list[int]], first: list[int], order: list[int], base: int) -> ForwardBatch:
    """New tokens `ids` of the sequences in `order`, whose KV blocks begin at `base`."""
    return ForwardBatch.build(
        [
            (ids[s], first[s], list(range(base + s * BLOCKS, base + (s + 1) * BLOCKS)), ())
            for s in order
        ]
    )


def one_by_one(runner: LocalRunner, steps: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens of each sequence by `forward` and the sampler in numpy, and logits of the first."""
    draws = [Draw(params, prompt) for params, prompt in zip(PARAMS, PROMPTS, strict=True)]
    ids, first = PROMPTS, [0] * len(PROMPTS)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    lines = []
    for _ in range(steps):
        logits = runner.forward(rows_of(ids, first, [0, 1, 2], 0)).numpy()
        lines.append(logits[0])
        first = [at + len(new) for at, new in zip(first, ids, strict=True)]
        ids = []
        for draw, row, found in zip(draws, logits, tokens, strict=True):
            found.append(draw.choose(row))
            draw.saw(found[-1])
            ids.append([found[-1]])
    return tokens, lines


def order_of(s: int, output: list[int], pending: int) -> DrawOrder:
    params = PARAMS[s]
    counted = params.frequency_penalty != 0
    kinds = sorted(set(output)) if counted else []
    return DrawOrder(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        uniform=uniform(params.seed, len(output) + (pending >= 0)),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seen=np.array(sorted({*PROMPTS[s], *output}), np.int32),
        counted=np.array(kinds, np.int32),
        counts=np.array([output.count(kind) for kind in kinds], np.float32),
        pending=pending,
    )


def one_ahead(
    runner: AheadRunner, steps: int, orders: list[list[int]]
) -> tuple[list[list[int]], list[np.ndarray]]:
    """As `one_by_one`, with each pass launched before the tokens of the one before are read."""
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    lines = []
    flight = None
    first = [0] * len(PROMPTS)
    for step in range(steps):
        order = orders[step]
        before = orders[step - 1]
        pending = [before.index(s) if step else -1 for s in range(len(PROMPTS))]
        ids = [[-1 - pending[s]] if step else PROMPTS[s] for s in range(len(PROMPTS))]
        ticket = runner.launch(
            rows_of(ids, first, order, 8),
            [order_of(s, tokens[s], pending[s]) for s in order],
            np.arange(len(order), dtype=np.int32),
            np.array([order.index(0)], np.int32),
        )
        if flight is not None:
            read(flight, before, tokens, lines)
        first = [at + len(new) for at, new in zip(first, ids, strict=True)]
        flight = ticket
    read(flight, orders[steps - 1], tokens, lines)
    return tokens, lines


def read(ticket, order: list[int], tokens: list[list[int]], lines: list[np.ndarray]) -> None:
    result = ticket.wait()
    assert result.lines.shape == (1, tiny.VOCAB)
    lines.append(result.lines[0])
    for s, token in zip(order, result.tokens.tolist(), strict=True):
        tokens[s].append(token)


def test_one_ahead_gives_the_tokens_of_one_by_one(runner: LocalRunner) -> None:
    """Rows in another order in every pass, penalties for tokens that the host does not know yet."""
    assert works_ahead(runner)
    steps = 5
    expected, logits = one_by_one(runner, steps)
    orders = [[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1], [2, 1, 0]]
    tokens, lines = one_ahead(runner, steps, orders)
    assert tokens == expected
    assert len({token for found in tokens for token in found}) > 5
    for ours, theirs in zip(lines, logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_pass_without_draws_between_two_leaves_the_tokens(runner: LocalRunner) -> None:
    """Publishing an adapter computes such passes, for its virtual tokens."""
    blocks = [14, 15]
    first = ForwardBatch.build([([5, 6, 7], 0, blocks, ())])
    nobody = np.empty(0, np.int32)
    order = replace(order_of(1, [], -1), temperature=0.0)
    ticket = runner.launch(first, [order], np.zeros(1, np.int32), nobody)
    runner.forward(ForwardBatch.build([([9, 9], 0, [12], ())]))
    second = ForwardBatch.build([([-1], 3, blocks, ())])
    after = runner.launch(second, [order], np.zeros(1, np.int32), nobody)
    token = int(ticket.wait().tokens[0])
    found = after.wait().tokens
    plain = runner.forward(ForwardBatch.build([([5, 6, 7, token], 0, [12, 13], ())]))
    assert found.tolist() == [int(plain[0].argmax())]


def test_a_launch_without_memory_for_its_results_leaves_the_tokens(
    runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine launches a smaller pass then, whose tokens are those of the launch before."""

    def no_memory(*_: object) -> HostRoom:
        raise torch.OutOfMemoryError("no pinned memory")

    nobody, one = np.empty(0, np.int32), np.zeros(1, np.int32)
    order = replace(order_of(1, [], -1), temperature=0.0)
    first = ForwardBatch.build([([5, 6, 7], 0, [14, 15], ())])
    other = ForwardBatch.build([([20, 21], 0, [12], ())])
    ticket = runner.launch(first, [order], one, nobody)
    with monkeypatch.context() as patch:
        patch.setattr(HostRoom, "of", no_memory)
        with pytest.raises(torch.OutOfMemoryError, match="pinned"):
            runner.launch(other, [order], one, nobody)
    after = runner.launch(ForwardBatch.build([([-1], 3, [14, 15], ())]), [order], one, nobody)
    token = int(ticket.wait().tokens[0])
    found = after.wait().tokens
    alone = runner.forward(ForwardBatch.build([([5, 6, 7, token], 0, [12, 13], ())]))
    assert found.tolist() == [int(alone[0].argmax())]
    assert token != int(runner.forward(other)[0].argmax())


def generate(runner: LocalRunner) -> dict[int, list[int]]:
    """The answers of an engine: sampled with all kinds of parameters, of different lengths."""
    core = EngineCore(runner)
    for s, (params, prompt) in enumerate(zip(PARAMS, PROMPTS, strict=True)):
        core.add(Submit(s, prompt, 3 + s, sampling=params))
    biased = SamplingParams(temperature=0.7, logit_bias={4: 3.0, 9: 2.5}, seed=1)
    core.add(Submit(3, [8, 9], 4, sampling=biased))
    core.add(Submit(4, [8, 7], 3, sampling=PARAMS[1], logprobs=2, prompt_logprobs=0))
    tokens: dict[int, list[int]] = {s: [] for s in range(5)}
    ended = 0
    for _ in range(12):
        for message in core.step():
            for output in message.outputs if isinstance(message, StepReport) else []:
                assert output.error is None
                tokens[output.id] += output.token_ids
                ended += output.finish is not None
        if ended == len(tokens):
            break
    assert ended == len(tokens)
    return tokens


def test_the_engine_gives_the_same_answers_at_both_paces(
    runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = generate(runner)
    monkeypatch.setattr(runner, "launch", None)
    assert ahead == generate(runner)
    assert [len(found) for found in ahead.values()] == [3, 4, 5, 4, 3]


def test_states_of_a_launch_are_its_own_whatever_follows_it(runner: LocalRunner) -> None:
    """The next pass overwrites the memory in which they were computed."""
    width = runner.info.base.config.hidden_size
    nobody = np.empty(0, np.int32)
    order = replace(order_of(1, [], -1), temperature=0.0)
    ids = [5, 6, 7, 8]

    def batch(first: int) -> ForwardBatch:
        text = ids, 0, [first, first + 1], ()
        return ForwardBatch.build([([20, 21], 0, [12], ()), text], [1], state_rows=[3, 5])

    expected = np.empty((2, width), np.float32)
    runner.forward(batch(14), expected)
    ticket = runner.launch(batch(14), [order], np.zeros(1, np.int32), nobody)
    other = ForwardBatch.build([([40, 41, 42], 0, [10], ())], state_rows=[0, 1, 2])
    after = runner.launch(other, [order], np.zeros(1, np.int32), nobody)
    found = ticket.wait().states
    assert after.wait().states.shape == (3, width)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all()


def test_the_engine_gives_the_same_vectors_at_both_paces(
    runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vectors() -> dict[int, bytes]:
        core = EngineCore(runner, EngineLimits(token_budget=6, max_running=4))
        for number, ids in enumerate((*PROMPTS, list(range(30, 43)))):
            pooling = ("last", "mean")[number % 2]
            core.add(Submit(number, ids, 1, pooling=pooling))
        core.add(Submit(9, [3, 4, 5], 6, sampling=SamplingParams(temperature=0.0)))
        states: dict[int, bytes] = {}
        while not core.idle:
            for message in core.step():
                if isinstance(message, StepReport):
                    states |= {each.id: each.state for each in message.outputs if each.state}
        core.check()
        return states

    ahead = vectors()
    assert ahead.keys() == {0, 1, 2, 3}
    monkeypatch.setattr(runner, "launch", None)
    assert vectors() == ahead
