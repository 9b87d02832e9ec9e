"""A published checkpoint, as transformers reads its GGUF file: logits, tokens and text.

`make test-real` fetches the file and runs these tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import forms, real_checkpoint, variants
from field.bases import CACHE, serving
from loraplex import Client
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.checkpoints.tokenizer import TOKENIZER
from loraplex_model.decoder.native import NativeDecoder
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.real

NEAR = 1e-4
"""Largest difference of a logit, for each unit of the largest logit."""

KEPT = 24
"""Logits of the last tokens of a text are compared."""

BLOCK_SIZE = 16

QUESTION = "The capital of Italy is Rome. The capital of France is"
"""The second sentence alone goes on with "a city that is known for its beautiful architecture"."""
PROMPTS = (
    QUESTION,
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Die Würde des Menschen ist unantastbar. " * 4,
    "One, two, three, four, five, six, seven, eight, nine, ten. " * 30,
)
"""The last is longer than the window of 512 positions."""

TEXTS = (
    *PROMPTS,
    "a   12",
    "x\n\n34",
    "naïve — 東京 😀",
    "<start_of_turn>user\n",
    " leading",
    "\t\t",
)


@dataclass(frozen=True)
class Served:
    """The published checkpoint as `field.bases.serving` takes it."""

    path: Path

    def folder(self) -> Path:
        """The GGUF file."""
        return self.path


@dataclass(frozen=True)
class Real:
    """The checkpoint as it is served, and as transformers computes it on the same NF4 weights."""

    path: Path
    ours: LoadedBase
    theirs: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def real() -> Real:
    path = real_checkpoint.ensure()
    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return Real(
        path,
        load_base(str(path), torch.float32, CACHE),
        variants.rounded(model.eval()),
        AutoTokenizer.from_pretrained(path.parent, **options),
    )


def logits(decoder: NativeDecoder, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the last `KEPT` tokens: half of them with the prompt, then token by token."""
    blocks = list(range(-(-len(ids) // BLOCK_SIZE)))
    kept = min(KEPT, len(ids))
    first = len(ids) - kept // 2
    rows = list(range(len(ids) - kept, first))
    found = [decoder.forward(ForwardBatch.build([(list(ids[:first]), 0, blocks, ())], rows))]
    for at in range(first, len(ids)):
        found.append(decoder.forward(ForwardBatch.build([([ids[at]], at, blocks, ())], [0])))
    return torch.cat(found)


def test_logits_equal_transformers(real: Real, record_property: Any) -> None:
    record_property("family", forms.family(real.theirs))
    decoder = NativeDecoder(real.ours.weights, 64, BLOCK_SIZE, 1, threads=1)
    window = real.ours.weights.config.sliding_windows[0]
    longest, worst = 0, 0.0
    for prompt in PROMPTS:
        ids = real.tokenizer(prompt)["input_ids"]
        longest = max(longest, len(ids))
        with torch.no_grad():
            expected = real.theirs(
                torch.tensor([ids]), logits_to_keep=min(KEPT, len(ids)), use_cache=False
            ).logits[0]
        difference = (logits(decoder, ids) - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference))
    record_property("difference", worst)
    assert window
    assert longest > window
    assert worst <= NEAR


def test_tokens_are_those_of_transformers(real: Real) -> None:
    ours = Tokenizer.from_file(str(real.ours.directory / TOKENIZER))
    for text in TEXTS:
        assert ours.encode(text).ids == real.tokenizer(text)["input_ids"], text


def test_an_answer_is_that_of_transformers_and_true(real: Real) -> None:
    given = real.tokenizer(QUESTION, return_tensors="pt")
    expected = real.theirs.generate(**given, max_new_tokens=8, do_sample=False)
    with Client(serving(Served(real.path), "--dtype", "float32").address) as client:
        answer = client.generate(QUESTION, max_new_tokens=8, temperature=0)
    assert list(answer.token_ids) == expected[0, given["input_ids"].shape[1] :].tolist()
    assert "Paris" in answer.text
