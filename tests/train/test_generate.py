"""Answers in training are the server's: greedy generation equals transformers' and PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_model.ops import build as kernels
from loraplex_training.methods.base import TrainedAdapter
from loraplex_training.run.generate import Generator

from train import tiny

PROMPTS = ([5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27])
NEW = 20
METHODS: dict[str, dict[str, object]] = {
    "lora": {"r": 4},
    "ia3": {},
    "prompt_tuning": {"num_virtual_tokens": 5, "init": "random"},
    "prefix_tuning": {"num_virtual_tokens": 19, "init": "random"},
}


CACHE = Path("var/cache")  # the compiled kernels of this checkout


def theirs(
    model: Any, prompts: Sequence[Sequence[int]], stop: int | None = None
) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                do_sample=False, eos_token_id=stop, pad_token_id=0,
            )  # fmt: skip
        answer = out[0].tolist()[len(prompt) :]
        found.append(answer[:-1] if stop is not None and answer[-1:] == [stop] else answer)
    return found


def ours(adapter: TrainedAdapter | None, **options: Any) -> list[list[int]]:
    delta = adapter.delta() if adapter else None
    return Generator(tiny.base(), CACHE, **options).answers(delta, PROMPTS, NEW, ())


def test_the_base_says_what_transformers_says() -> None:
    expected = theirs(tiny.model(), PROMPTS)
    assert ours(None) == expected
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_in_training_says_what_peft_says(method: str, tmp_path: Path) -> None:
    adapter = tiny.make(method, **METHODS[method])
    tiny.disturb(adapter, 0.2)
    expected = theirs(tiny.opened_by_peft(tiny.save(adapter, tmp_path / "a")), PROMPTS)
    assert ours(adapter) == expected
    assert expected != theirs(tiny.model(), PROMPTS)
    assert ours(adapter, cache_tokens=1) == expected  # one after another


def test_an_answer_ends_before_a_stop_token() -> None:
    full = theirs(tiny.model(), PROMPTS)
    stop = full[0][5]
    expected = theirs(tiny.model(), PROMPTS, stop)
    assert Generator(tiny.base(), CACHE).answers(None, PROMPTS, NEW, [stop]) == expected
    assert len(expected[0]) <= 5


def test_an_answer_ends_where_the_context_does() -> None:
    context = tiny.base().config.max_positions
    adapter = tiny.make("prompt_tuning", num_virtual_tokens=5, init="random")
    prompts = [[3] * (context - 7), [3] * (context - 2), [4]]
    answers = Generator(tiny.base(), CACHE).answers(adapter.delta(), prompts, 3, ())
    assert [len(answer) for answer in answers] == [2, 0, 3]


def test_without_compiled_kernels_the_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tiny.make("prefix_tuning", num_virtual_tokens=3, init="random")
    with_kernels = ours(adapter)

    def unavailable(**_: Any) -> None:
        raise kernels.KernelsUnavailable("no compiler")

    monkeypatch.setattr(kernels, "load", unavailable)
    assert ours(adapter) == with_kernels


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_trainer(method: str) -> None:
    adapter = tiny.make(method, **METHODS[method])
    tiny.disturb(adapter, 0.2)
    found = Generator(tiny.base(), CACHE).logits(adapter.delta(), PROMPTS[2])
    expected = tiny.our_logits(adapter.delta(), tokens=PROMPTS[2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
