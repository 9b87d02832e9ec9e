"""A model that writes nonsense, and whose every token tells on the engine as the oracle's does.

Its logits are random numbers that follow from the token that the oracle would say, so from all
tokens of the sequence, from its adapters and from the KV memory. Tokens that close strings, lists
and objects are favoured, so that texts end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from engine.driving import Engine
from engine.oracle import OracleRunner
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.messages import SamplingParams, Structure
from loraplex_server.engine.structures.library import read_tokenizer
from loraplex_server.forms.form import FormKind, StructureForm
from loraplex_server.forms.grammars import grammar_of
from rpc.harness import EOS, VOCAB, make_tokenizer, write_model
from tokenizers import Tokenizer

CLOSERS = frozenset('"]},:0123456789')


class Scribbler(OracleRunner):
    """See the module. `favour` is added to the logits of tokens that are closers only."""

    def __init__(self, folder: Path, favour: float = 4.0, **options: Any) -> None:
        options = {"vocab_size": VOCAB, "eos_token_ids": [EOS], "num_blocks": 512, **options}
        options.setdefault("tokenizer_path", str(write_model(folder / "model")))
        super().__init__(**options)
        tokens = spellings(self.tokenizer_path, self.vocab_size)
        closing = [bool(text) and set(text) <= CLOSERS for text in tokens]
        self.bias = np.array(closing, np.float32) * np.float32(favour)

    def forward(self, batch: ForwardBatch) -> np.ndarray:
        logits = super().forward(batch)
        for row in logits:
            if np.isfinite(row).all():
                noise = np.random.default_rng(int(row.argmax())).standard_normal(len(row))
                row[:] = noise.astype(np.float32) * 2 + self.bias
        return logits


@cache
def spellings(folder: str, vocab_size: int) -> Sequence[str]:
    """The text of each token; "" for control tokens."""
    found = read_tokenizer(Path(folder) / "tokenizer.json", vocab_size, [EOS])
    return [
        "" if found.is_special_token(token) else found.decode_str([token])
        for token in range(vocab_size)
    ]


@cache
def words() -> Tokenizer:
    """The tokenizer of the harness."""
    return make_tokenizer()


def structure(kind: str, *texts: str, ends: Sequence[int] = (EOS,)) -> Structure:
    """What the front makes of a form."""
    form = StructureForm(FormKind(kind), list(texts))
    return Structure(grammar_of(form), form.is_json, list(ends))


def text_of(engine: Engine, request: int) -> str:
    """The text of a request's tokens."""
    return str(words().decode(engine.tokens(request), skip_special_tokens=False))


def seeded(seed: int = 0, **params: Any) -> SamplingParams:
    """Sampling at temperature 1."""
    return SamplingParams(**{"temperature": 1.0, "seed": seed, **params})
