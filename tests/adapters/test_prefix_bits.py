"""Answers with the prefix cache have the bits of answers without it, on real decoders.

What a request finds was computed in passes with other rows, in other chunks, by another request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters.peft_files import TIED
from adapters.peft_kinds import Gallery, names_on
from adapters.test_alora import AtOnce
from families import variants
from loraplex_adapters.format.examine import inspect
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    Merge,
    Output,
    SamplingParams,
    StepReport,
    Submit,
    Unload,
    Unmerge,
)
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, build

TOP = 128
"""Log-probabilities that are compared of each new token."""

Answer = tuple[list[int], list[list[tuple[int, float]]]]


def runner_of(model: Path, dtype: str = "float32") -> LocalRunner:
    return build(
        RunnerConfig(
            model=str(model),
            dtype=dtype,
            device="cpu",
            threads=1,
            cache="var/cache",
            max_context=0,
            kv_tokens=4096,
            kv_memory=0,
            adapter_memory=1 << 24,
            merge_memory=1 << 24,
            merge_dtype=dtype,
            max_rank=128,
            virtual_tokens=256,
            max_virtual_tokens=16,
        )
    )


class Asking:
    """An engine over a runner, and what it answers."""

    def __init__(self, runner: LocalRunner, **limits: Any) -> None:
        self.runner = runner
        self.core = EngineCore(runner, EngineLimits(**limits), loader=AtOnce(runner))
        self.found: list[int] = []

    def ask(self, *asked: tuple[list[int], int, list[AdapterRef]]) -> list[Answer]:
        """Answers to prompts of so many new tokens with these adapters, all at once.

        `found` has for each the number of tokens that were found.
        """
        for id, (prompt, new, refs) in enumerate(asked):
            params = SamplingParams(temperature=0.0)
            self.core.add(Submit(id, prompt, new, refs, params, logprobs=TOP))
        outputs: dict[int, list[Output]] = {}
        self.rest(outputs)
        self.core.check()
        self.found = [outputs[id][0].cached_tokens for id in range(len(asked))]
        return [_answer(outputs[id]) for id in range(len(asked))]

    def rest(self, outputs: dict[int, list[Output]] | None = None) -> None:
        for _ in range(1000):
            for message in self.core.step():
                for output in message.outputs if isinstance(message, StepReport) else ():
                    assert output.error is None, output.error
                    assert outputs is not None
                    outputs.setdefault(output.id, []).append(output)
            if self.core.idle:
                return
        raise AssertionError("the engine does not come to rest")

    def order(self, message: Merge | Unmerge | Unload) -> None:
        self.core.control(message)
        self.rest()


def _answer(outputs: list[Output]) -> Answer:
    assert outputs[-1].finish == "length"
    entries = [entry for output in outputs for entry in output.logprobs]
    return [t for output in outputs for t in output.token_ids], [entry.top for entry in entries]


def prompt(size: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, variants.VOCAB, size).tolist()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["gemma2", "phi3-window", "phi4-mini", "mixtral"])
def test_bases_of_all_sorts(variant: str, dtype: str, tmp_path: Path) -> None:
    """Windows in some and in all layers, two sets of frequencies, experts.

    Of the base with two sets of frequencies, short and long sequences meet in one cache.
    """
    runner = runner_of(variants.write(variant, tmp_path), dtype)
    size = runner.block_size
    head = prompt(size + 3)
    short = runner.info.base.config.short_positions
    lengths = (4, 30) if short else (4, 5)
    assert not short or size + 4 + 4 <= short
    rounds = [
        [(head, new, []) for new in lengths],
        [([*head, at], new, []) for new in lengths for at in (5, 6, 7)],
        [([*head, *prompt(2 * size, 1)], 4, []), (head, 4, []), (head, 30, [])],
    ]
    cold = Asking(runner, prefix_cache=False)
    expected = [[cold.ask(one)[0] for one in together] for together in rounds]
    multi_turn = ([*head, *expected[0][1][0], 9], 4, [])
    again = cold.ask(multi_turn)
    for budget in (3, 7, 512):
        warm = Asking(runner, token_budget=budget, max_running=3)
        found = []
        for together, answers in zip(rounds, expected, strict=True):
            assert warm.ask(*together) == answers
            found.append(warm.found)
        assert warm.ask(multi_turn) == again
        assert warm.found[0] >= size
        first = [0, 0] if short else [0, size]
        assert found[:2] == [first, [size] * 6]
        assert found[2][0] == size


@pytest.fixture(scope="module")
def tied(gallery: Gallery) -> LocalRunner:
    return runner_of(gallery.checkpoint(TIED))


def ref(runner: LocalRunner, gallery: Gallery, name: str, weight: float = 1.0) -> AdapterRef:
    directory = gallery.adapter(TIED, name)
    return AdapterRef(inspect(directory, runner.info.base).digest, str(directory), weight)


def test_adapters_of_every_kind(tied: LocalRunner, gallery: Gallery) -> None:
    size = tied.block_size
    text = prompt(2 * size + 3)
    named = {name: ref(tied, gallery, name) for name in names_on(TIED)}
    users = [[one] for one in {one.digest: one for one in named.values()}.values()]
    assert {"lora", "dora", "prompt", "prefix"} <= named.keys()
    users += [[ref(tied, gallery, "lora", 0.5)], []]
    users += [[ref(tied, gallery, "lora", w), named["dora"]] for w in (0.5, -0.5)]
    asked = [(text, 3, refs) for refs in users]
    cold = Asking(tied, prefix_cache=False)
    alone = cold.ask(*asked)
    assert not any(cold.found)
    reset(cold)
    warm = Asking(tied, token_budget=64)
    assert warm.ask(*asked) == alone
    assert not any(warm.found), "an adapter has found what another one computed"
    assert warm.ask(*asked) == alone
    assert min(warm.found) > size
    distinct = {tuple(top[0][1] for top in tops) for _, tops in alone}
    assert len(distinct) > len(users) // 2, "the adapters change nothing"
    reset(warm)


def reset(asking: Asking) -> None:
    """Takes every adapter off the device, so that another engine can use the runner."""
    for at, digest in enumerate(list(asking.core.adapters.slots.residents)):
        asking.order(Unload(at, digest))


def test_samples_of_one_prompt_compute_it_once(tied: LocalRunner, gallery: Gallery) -> None:
    text = prompt(3 * tied.block_size + 2)
    for refs in ([], [ref(tied, gallery, "lora")]):
        cold = Asking(tied, prefix_cache=False)
        alone = cold.ask((text, 4, refs))[0]
        reset(cold)
        for budget in (5, 512):
            warm = Asking(tied, token_budget=budget, max_running=4)
            assert warm.ask(*[(text, 4, refs)] * 4) == [alone] * 4
            assert warm.found == [0, *[3 * tied.block_size] * 3]
            reset(warm)


def test_samples_beside_one_whose_prompt_is_scored_have_their_bits(tied: LocalRunner) -> None:
    """As the front asks for several completions: each draws with a seed of its own."""
    text = prompt(3 * tied.block_size + 2)

    def answers(ids: range, **limits: Any) -> list[list[Output]]:
        asking = Asking(tied, **limits)
        for id in ids:
            params = SamplingParams(temperature=1.5, seed=40 + id)
            scored = None if id else 2
            submit = Submit(id, text, 6, [], params, logprobs=TOP, prompt_logprobs=scored)
            asking.core.add(submit)
        outputs: dict[int, list[Output]] = {}
        asking.rest(outputs)
        reset(asking)
        return [outputs[id] for id in ids]

    alone = [answers(range(id, id + 1), prefix_cache=False)[0] for id in range(4)]
    for budget in (7, 512):
        together = answers(range(4), token_budget=budget, max_running=4)
        assert [*map(_answer, together)] == [*map(_answer, alone)]
        assert together[0][0].prompt_logprobs == alone[0][0].prompt_logprobs
        assert sum(outputs[0].cached_tokens for outputs in together) >= 2 * 3 * tied.block_size


def test_merged_rows_have_other_bits_and_share_nothing_with_unmerged_ones(
    tied: LocalRunner, gallery: Gallery
) -> None:
    text = prompt(2 * tied.block_size + 3)
    one = ref(tied, gallery, "lora")
    cold = Asking(tied, prefix_cache=False)
    (unmerged,) = cold.ask((text, 4, [one]))
    cold.order(Merge(1, one))
    (merged,) = cold.ask((text, 4, [one]))
    assert merged != unmerged, "the same bits: nothing is shown"
    reset(cold)
    warm = Asking(tied)
    found = []
    for order, expected in (
        (None, unmerged),
        (Merge(1, one), merged),
        (None, merged),
        (Unmerge(2, one.digest), unmerged),
        (Merge(3, one), merged),
        (Unload(4, one.digest), unmerged),
    ):
        if order is not None:
            warm.order(order)
        assert warm.ask((text, 4, [one])) == [expected]
        found += warm.found
    full = 2 * tied.block_size
    assert found == [0, 0, full, full, 0, full]
    reset(warm)


def test_another_adapter_behind_a_name_finds_nothing(tied: LocalRunner, gallery: Gallery) -> None:
    text = prompt(2 * tied.block_size + 3)
    warm = Asking(tied)
    for name in ("lora", "rslora"):
        (answer,) = warm.ask((text, 4, [ref(tied, gallery, name)]))
        assert warm.found == [0]
        cold = Asking(tied, prefix_cache=False)
        reset(warm)
        assert cold.ask((text, 4, [ref(tied, gallery, name)])) == [answer]
        reset(cold)
