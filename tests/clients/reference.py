"""Log-likelihoods of the default model with an example adapter, by transformers and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from model import peft_oracle


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-probability of a continuation, and whether each of its tokens is the likeliest."""

    logprob: float
    is_greedy: bool


class Reference:
    """The default model, its weights rounded to NF4 as ours, in float32 by transformers."""

    def __init__(self, base: Path, adapter: Path) -> None:
        """`base` is the model in Hugging Face's form, as `bench/base.py` writes it."""
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model: Any = PeftModel.from_pretrained(peft_oracle.round_in_place(model), adapter)
        self._model.eval()
        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))

    def of(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """For each context with its continuation, split into tokens as lm-eval does."""
        return [self._one(context, continuation) for context, continuation in pairs]

    def _one(self, context: str, continuation: str) -> Likelihood:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = self._ids(context + continuation)
        start = len(self._ids(context))
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([whole])).logits[0]
        logprobs = logits[start - 1 : -1].log_softmax(-1)
        chosen = torch.tensor(whole[start:])
        total = logprobs.gather(1, chosen[:, None]).sum()
        return Likelihood(float(total), bool((logprobs.argmax(-1) == chosen).all()))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
