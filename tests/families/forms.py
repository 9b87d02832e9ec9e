"""Checkpoints of the families in every form that is served, with the model they were made of.

A case is a variant in one form: "safetensors", "nf4" (quantised by bitsandbytes beforehand), "gguf"
or "multimodal" (the text decoder of a model that reads images, with all of its tensors).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from families import test_gguf_families, variants
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model import gguf_files, tiny

OLDER = ("mistral-window", "qwen2", "qwen3")
"""Variants of `model.tiny`: families that compute like Llama."""

MULTIMODAL = {"gemma3": "gemma3", "mistral-text": "mistral3", "ministral3": "mistral3"}
"""`model_type` of the models that read images, by the variant of their text decoder."""

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
"""The entry `quantization_config` of config.json."""


def cases() -> list[tuple[str, str]]:
    """`(form, variant)` of every case; variants in GGUF are those of `test_gguf_families.CASES`."""
    named = [*OLDER, *variants.VARIANTS]
    gguf = [("gguf", case) for case in (*OLDER[1:], *test_gguf_families.CASES)]
    images = [("multimodal", variant) for variant in MULTIMODAL]
    both = [(form, variant) for form in ("safetensors", "nf4") for variant in named]
    return [*both, *gguf, *images]


def build(form: str, variant: str) -> PreTrainedModel:
    """The model of a case, in float32."""
    if form == "multimodal":
        return _reading_images(variant)
    if variant in OLDER:
        return tiny.build(variant)
    return (test_gguf_families if form == "gguf" else variants).build(variant)


def family(model: PreTrainedModel) -> str:
    """The architecture of a model, or of its text decoder."""
    kind = model.config.get_text_config().model_type
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def _reading_images(variant: str) -> PreTrainedModel:
    kind, settings = variants.VARIANTS.get(variant, ("mistral", {"sliding_window": 7}))
    text = CONFIG_MAPPING[kind](**{**variants._SHAPE, **settings})
    options = {"mm_tokens_per_image": 1} if MULTIMODAL[variant] == "gemma3" else {}
    vision = {**VISION, "model_type": "siglip_vision_model" if options else "pixtral"}
    config = CONFIG_MAPPING[MULTIMODAL[variant]](text_config=text, vision_config=vision, **options)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return variants.randomised(model, 0)


def write(form: str, model: PreTrainedModel, directory: Path) -> Path:
    """Writes the model in a form; returns what `--model` is given."""
    return _WRITERS[form](model, directory)


def _safetensors(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def _gguf(model: PreTrainedModel, directory: Path) -> Path:
    directory.mkdir(parents=True)
    return gguf_files.write_model(model, directory / "model.gguf")


def _nf4(model: PreTrainedModel, directory: Path) -> Path:
    """As transformers saves a model whose linear modules bitsandbytes has replaced."""
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in [n for n in tensors if n in linear - {"lm_head.weight"} or ".experts." in n]:
        codes, state = bnb.quantize_4bit(
            tensors[name], blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        further = state.as_dict(packed=True).items()
        tensors |= {name: codes, **{f"{name}.{key}": value for key, value in further}}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": NF4}))
    return directory


_WRITERS: dict[str, Callable[[PreTrainedModel, Path], Path]] = {
    "safetensors": _safetensors,
    "nf4": _nf4,
    "gguf": _gguf,
    "multimodal": _safetensors,
}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' logits [T, vocab] of one sequence."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found
