"""Adapters of every kind on tiny NF4 bases, and the logits that PEFT computes with them.

PEFT writes the files and loads them again over bitsandbytes' `Linear4bit` in float32; its logits
are the expected ones. Bottlenecks, which PEFT does not have, are hooks on the same model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
from adapters.peft_files import TIED, Case, Q, base_info, lora
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from model.passes import token_ids

from adapters import bottlenecks, copies, folded_cases, peft_files
from model import peft_oracle, tiny

ATTENTION = [Q, "k_proj", "v_proj", "o_proj"]
BASE = "base"

MORE: dict[str, Case] = {
    "rslora": lora("llama", {}, r=6, use_rslora=True, target_modules="all-linear"),
    "patterns": lora(
        "llama",
        {},
        target_modules=ATTENTION,
        rank_pattern={"k_proj": 7, "layers.1.self_attn.q_proj": 24},
        alpha_pattern={"o_proj": 20},
    ),
    "dora, rslora": lora(
        "qwen2",
        {},
        target_modules="all-linear",
        use_dora=True,
        use_rslora=True,
        rank_pattern={"down_proj": 9},
    ),
    "dora with biases": lora(TIED, {}, target_modules=ATTENTION, use_dora=True, bias="all"),
    "lora_bias beside biases": lora(
        TIED, {}, target_modules=ATTENTION, lora_bias=True, bias="lora_only"
    ),
    "everything of LoRA": lora(
        "qwen2",
        {},
        target_modules="all-linear",
        bias="all",
        modules_to_save=["lm_head", "input_layernorm", "norm"],
        trainable_token_indices=[9, 4, 7],
    ),
    **copies.CASES,
    **folded_cases.CASES,
    "prefix of full blocks": Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 8}, {}),
    "prompt of one": Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 1}, {}),
}
CASES = {**peft_files.CASES, **MORE}
BOTTLENECKS = bottlenecks.ADAPTERS

ONE_OF_EACH = (
    "lora",
    "rslora",
    "dora",
    "lora_bias",
    "head",
    "tokens",
    "saved norms",
    "adalora",
    "ia3",
    "beft",
    "norms",
    "tokens alone",
    "prompt",
    "p-tuning",
    "prefix",
    "prefix from an encoder",
    "bottleneck relu",
    "bottleneck silu",
    "bottleneck gelu",
)
# The tied, biased base has whatever an adapter can change, but for norms of heads. On a tied base
# PEFT cannot load "tokens alone, both", and nests the layers that train tokens in a saved head.
ELSEWHERE = ("norms of heads", "tokens alone, both", "everything of LoRA")

BLENDS: dict[str, tuple[tuple[str, float], ...]] = {
    "half": (("dora with biases", 0.5),),
    "blend": (("lora", 0.75), ("rslora", -0.5), ("patterns", 1.0)),
    "blend of kinds": (
        ("rslora", 0.5),
        ("dora on a biased base", -0.75),
        ("bias all", 0.4),
        ("lora_bias", 0.8),
        ("adalora", 1.5),
        ("ia3", 0.6),
        ("ia3 on squares", -0.3),
        ("beft", 1.5),
        ("norms", 0.25),
        ("saved norms", 0.5),
        ("tied embeddings", 0.3),
        ("tied tokens that differ", 0.7),
        ("saved tied, both", -0.2),
    ),
    "blend of folded kinds": (
        ("loha", 0.5),
        ("lokr of whole matrices", -0.25),
        ("miss, few columns", 0.4),
        ("gralora, hybrid", 0.3),
        ("randlora", -0.5),
        ("vera", 0.75),
        ("lora", 0.5),
    ),
    "blend by the served weight": (
        ("delora with biases", 0.3),
        ("hra, orthogonal", -0.5),
        ("para", 0.4),
        ("deft", 0.5),
        ("peanut", -0.5),
        ("kasa with biases", 0.25),
        ("bd-lora of some", 0.5),
        ("mica", 1.0),
    ),
}
"""Weighted sums of adapters, on the tied base. No module's input and output are scaled by two
different ones: their product is then no sum of what each changes."""


def names_on(variant: str) -> list[str]:
    """Names of the adapters of a base: its own, and those that fit any base."""
    if variant == TIED:
        return [name for name in (*CASES, *BOTTLENECKS) if name not in ELSEWHERE]
    if variant == WINDOW:
        return ["lora", "p-tuning", "prefix", "prefix of full blocks"]
    own = {name for name, case in CASES.items() if case.variant == variant}
    if variant == "qwen3":
        own |= set(ONE_OF_EACH)
    if variant == "mistral":
        own |= {"lora", "dora", "adalora", "ia3", "prompt", "prefix"}
    return [name for name in (*CASES, *BOTTLENECKS) if name in own]


WINDOW = "mistral-window"
VARIANTS = ("llama", TIED, "qwen2", "qwen3", "mistral", WINDOW)
SERVED = [(variant, name) for variant in VARIANTS for name in names_on(variant)]


def ids_of(name: str) -> list[int]:
    """An adapter's prompt, whose length varies; it contains every token that an adapter trains."""
    seed = sum(name.encode())
    return [5, 3, 9, 7, 1, 4, 2, *token_ids(seed, 4 + seed % 5, tiny.VOCAB)]


class Gallery:
    """Writes bases and adapters below `root`, each once, and computes PEFT's logits."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.checkpoint = cache(self._checkpoint)
        self.weights = cache(self._weights)
        self.adapter = cache(self._adapter)
        self.load = cache(self._load)
        self.expected = cache(self._expected)
        self._quantised = cache(self._load_quantised)
        self._dequantised = cache(tiny.oracle)

    def shapes(self, variant: str, dtype: torch.dtype = torch.float32) -> BaseInfo:
        """A base as admission sees it."""
        return replace(base_info(variant), dtype=str(dtype).removeprefix("torch."))

    def merged(self, variant: str, name: str) -> torch.Tensor:
        """Logits [tokens, vocab], float32, of the model into which PEFT has merged the adapter."""
        model = _copy(self._dequantised(variant))
        return _logits(self._with_peft(model, variant, name).merge_and_unload(), name)

    def _checkpoint(self, variant: str) -> Path:
        return tiny.write(variant, self._root / variant)

    def _weights(self, variant: str, dtype: torch.dtype = torch.float32) -> BaseWeights:
        return load_base(str(self.checkpoint(variant)), dtype, self._root / "cache").weights

    def _adapter(self, variant: str, name: str) -> Path:
        directory = self._root / f"{variant} {name}"
        if name in BOTTLENECKS:
            return bottlenecks.write(name, self.shapes(variant), directory)
        with one_thread():
            return peft_files.write(replace(CASES[name], variant=variant), directory)

    def _load(
        self, variant: str, name: str, dtype: torch.dtype = torch.float32
    ) -> tuple[CheckedAdapter, AdapterDelta]:
        base, directory = self.shapes(variant, dtype), self.adapter(variant, name)
        spec = inspect(directory, base, AdapterLimits())
        return load(directory, spec.digest, self.weights(variant, dtype))

    def _expected(self, variant: str, name: str) -> torch.Tensor:
        """Logits [tokens, vocab] of `ids_of(name)`; for `BASE` without an adapter."""
        parts = [part for part, _ in BLENDS.get(name, ((name, 1.0),))]
        folded = any(part in folded_cases.CASES for part in parts)
        # PEFT cannot adapt `Linear4bit` by all of them.
        model = _copy((self._dequantised if folded else self._quantised)(variant))
        if name in BOTTLENECKS:
            bottlenecks.attach(model, self.adapter(variant, name))
        elif name in BLENDS:
            self._blend(model, variant, name)
        elif name != BASE:
            model = self._with_peft(model, variant, name)
        return _logits(model, name)

    def bare(self, variant: str, name: str) -> torch.Tensor:
        """Logits [tokens, vocab] of the base alone."""
        return _logits(self._quantised(variant), name)

    def _load_quantised(self, variant: str) -> Any:
        return peft_oracle.quantised(self.checkpoint(variant), torch.float32)

    def _with_peft(self, model: Any, variant: str, name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(model, self.adapter(variant, name)).eval()

    def _blend(self, model: Any, variant: str, name: str) -> None:
        """Adds to each module's output the weighted changes that each adapter's own model makes."""
        parts = [
            (self._with_peft(_copy(model), variant, part).base_model.model, weight)
            for part, weight in BLENDS[name]
        ]
        for path, module in model.named_modules():
            if path and not list(module.children()):
                modules = [(part.get_submodule(path), weight) for part, weight in parts]
                module.register_forward_hook(partial(_add_changes, modules))


def _add_changes(
    modules: Sequence[tuple[Any, float]], base: Any, inputs: tuple[Any, ...], output: Any
) -> Any:
    if not isinstance(output, torch.Tensor):
        return output  # cosines and sines
    return output + sum(weight * (module(*inputs) - output) for module, weight in modules)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sets torch to one thread, which is faster for matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy(model: Any) -> Any:
    """A copy of a model for an adapter. It shares the 4-bit weights, which are never written."""
    shared = {id(p): p for p in model.parameters() if p.dtype == torch.uint8}
    return copy.deepcopy(model, shared)


def _logits(model: Any, name: str) -> torch.Tensor:
    ids = ids_of(name)
    task = CASES[name].task if name in CASES else None
    tasks = {} if task is None else {"task_ids": torch.tensor([task])}
    with torch.no_grad(), one_thread():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), **tasks).logits[0]
    return logits[-len(ids) :].float()
