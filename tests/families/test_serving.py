"""Families through a real server: answers of the base and of an adapter in one batch are those of
transformers and PEFT, from the conversation to the text. `make test-families` runs these tests.
"""

from __future__ import annotations

import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import adapter_kinds, forms, variants
from field.bases import CACHE, VOCAB, byte_level, chat_tokenizer, serving
from loraplex import Client, Completion
from loraplex_model.checkpoints.load import load_base
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

pytestmark = pytest.mark.slow

SHORT_CONTEXT = 64
"""Tokens of the served variant with LongRoPE that its short factors are for."""

CHANGES: dict[str, dict[str, Any]] = {
    # Tied, random embeddings would repeat the last token for ever.
    "gemma3": {"tie_word_embeddings": False},
    "phi4-mini": {
        "original_max_position_embeddings": SHORT_CONTEXT,
        "rope_parameters": {
            **variants._LONG,
            "original_max_position_embeddings": SHORT_CONTEXT,
        },
    },
}

FORMS = {"gemma3": "nf4", "phi4-mini": "safetensors", "mixtral": "nf4", "cohere2": "safetensors"}
"""The families that are served, and the form of their checkpoints."""

EXPERTS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

TALKS = ("hi", "a", "Once upon a time")
NEAR = 1e-4
"""Largest difference of a log-probability."""

HALF = "\ufffd"
"""What a text ends with if its last character is not complete."""

NEW = 24
"""Tokens of an answer; with a prompt of any of `TALKS` they fit the short context."""


@dataclass(frozen=True)
class Served:
    """A variant with a tokenizer and a chat template."""

    variant: str

    @cache  # noqa: B019  instances live as long as the run
    def folder(self) -> Path:
        """The Hugging Face directory."""
        place = Path(_scratch().name) / self.variant
        forms.write(FORMS[self.variant], self.build(), place)
        chat_tokenizer(byte_level(begins=True)).save_pretrained(place)
        return place

    def build(self) -> PreTrainedModel:
        """The model as it was trained, before it is quantised."""
        kind, settings = variants.VARIANTS[self.variant]
        changes = {**CHANGES.get(self.variant, {}), "vocab_size": VOCAB}
        config = CONFIG_MAPPING[kind](**{**variants._SHAPE, **settings, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return variants.randomised(model, 0)

    def rounded(self) -> PreTrainedModel:
        """The model on the weights that are served; it generates beyond its end token."""
        model = variants.rounded(self.build())
        model.generation_config.eos_token_id = None
        return model

    def adapted(self, model: PreTrainedModel, directory: Path) -> Any:
        """Saves an adapter, and returns PEFT's model with it."""
        if self.variant == "mixtral":
            return _expert_adapter(model, directory)
        base = load_base(str(self.folder()), torch.float32, CACHE).weights
        return adapter_kinds.adapted("LoRA", base.info, model, directory)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="loraplex-families-")


def _expert_adapter(model: PreTrainedModel, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **EXPERTS)
        found = peft.get_peft_model(model, config).eval()
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in sorted(found.named_parameters()):
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        found.save_pretrained(directory)
    return found


def asked(client: Client, questions: list[tuple[str, str | None, int]]) -> list[Completion]:
    """Greedy answers to `(message, adapter, tokens)`, all at once."""

    def ask(question: tuple[str, str | None, int]) -> Completion:
        text, adapter, new = question
        return client.generate(
            messages=[{"role": "user", "content": text}],
            adapter=adapter,
            max_new_tokens=new,
            temperature=0,
            ignore_eos=True,
            logprobs=0,
        )

    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(ask, questions))


def prompt(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )
    return list(found["input_ids"])


def generated(model: Any, ids: list[int], new: int) -> list[int]:
    """Tokens of transformers' greedy answer."""
    with torch.no_grad():
        given = torch.tensor([ids])
        found = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            do_sample=False,
        )
    return list(found[0, len(ids) :].tolist())


def distance(answer: Completion, model: Any, ids: list[int]) -> float:
    """Largest difference of the tokens' log-probabilities from those of transformers.

    It computes prompt and answer as one sequence, and must choose each token of the answer.
    """
    tokens = torch.tensor(answer.token_ids)
    found = forms.logits(model, [*ids, *answer.token_ids])[len(ids) - 1 : -1]
    assert torch.equal(found.argmax(-1), tokens)
    expected = found.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return float((expected - torch.tensor(scores(answer))).abs().max())


def scores(answer: Completion) -> list[float]:
    return [entry.chosen.logprob for entry in answer.logprobs]


@pytest.mark.parametrize("variant", FORMS)
def test_answers_are_those_of_transformers_and_peft(
    variant: str, tmp_path: Path, record_property: Any
) -> None:
    served = Served(variant)
    record_property("family", forms.family(served.build()))
    running = serving(served, "--dtype", "float32")
    base = served.rounded()
    peft_model = served.adapted(served.rounded(), running.import_root / "noise")
    tokenizer = AutoTokenizer.from_pretrained(served.folder())
    questions = [(text, adapter, NEW) for text in TALKS for adapter in (None, "noise")]
    with Client(running.address) as client:
        client.register_adapter("noise", "noise")
        rendered = client.render_chat([{"role": "user", "content": TALKS[0]}])
        answers = asked(client, questions)
    assert list(rendered.token_ids) == prompt(tokenizer, TALKS[0])
    worst = 0.0
    for (text, adapter, new), answer in zip(questions, answers, strict=True):
        model, ids = peft_model if adapter else base, prompt(tokenizer, text)
        expected = generated(model, ids, new)
        assert list(answer.token_ids) == expected, (text, adapter)
        decoded = tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.text.rstrip(HALF) == decoded.rstrip(HALF)
        worst = max(worst, distance(answer, model, ids))
    record_property("difference", worst)
    assert worst <= NEAR
    for one, other in zip(answers[::2], answers[1::2], strict=True):
        assert abs(scores(one)[0] - scores(other)[0]) > 10 * NEAR, "the adapter changes nothing"


def test_long_and_short_requests_side_by_side_have_their_own_positions() -> None:
    """Prompt and answer together decide, though the prompt alone fits the short context."""
    served = Served("phi4-mini")
    running = serving(served, "--dtype", "float32")
    base = served.rounded()
    peft_model = served.adapted(served.rounded(), running.import_root / "far")
    tokenizer = AutoTokenizer.from_pretrained(served.folder())
    ids = prompt(tokenizer, TALKS[0])
    long = SHORT_CONTEXT - len(ids) + 20
    questions = [(TALKS[0], each, new) for each in (None, "far") for new in (NEW, long)]
    with Client(running.address) as client:
        client.register_adapter("far", "far")
        answers = asked(client, questions)
    for model, (short_answer, long_answer) in ((base, answers[:2]), (peft_model, answers[2:])):
        assert len(long_answer.token_ids) == long
        assert list(short_answer.token_ids) == generated(model, ids, NEW)
        assert distance(short_answer, model, ids) <= NEAR
        assert distance(long_answer, model, ids) <= NEAR
        assert abs(scores(long_answer)[0] - scores(short_answer)[0]) > 10 * NEAR
