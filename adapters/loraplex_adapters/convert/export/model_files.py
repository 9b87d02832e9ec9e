"""Configuration and tokenizer files of a merged checkpoint, taken from the base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from loraplex_model.base.hf_config import text_part
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints import checkpoint
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.checkpoints.tokenizer import TOKENIZER, TokenizerInfo

from loraplex_adapters.convert.export.directory import write_json
from loraplex_adapters.convert.export.parameters import Form

CONFIG, GENERATION = "config.json", "generation_config.json"
_WRITTEN = (CONFIG, checkpoint.INDEX)  # written here, not copied


def write_config(
    target: Path,
    base: LoadedBase,
    dtype: torch.dtype,
    form: Form,
    quantisation: Mapping[str, object] | None,
) -> None:
    """Writes the base's config.json with the new type of the weights and the form's overrides.

    Of a multimodal model it is that of the text decoder, which is what the weights are of. Raises
    Refusal(EXPORT_UNSUPPORTED) for a GGUF file that scales positions by a tensor.
    """
    source = checkpoint.open_source(base.source)
    if source.rope_divisors:
        raise Refusal(
            Reason.EXPORT_UNSUPPORTED,
            "the base's GGUF file scales positions in a way that config.json cannot express; "
            "use the base as safetensors",
            "model",
        )
    stated = text_part(source.config)
    config: dict[str, Any] = {k: v for k, v in stated.items() if v is not None}
    config.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    if "torch_dtype" in config:
        config["torch_dtype"] = name
    config |= {"architectures": [base.weights.config.architecture], "dtype": name, **form.overrides}
    if quantisation is not None:
        config["quantization_config"] = dict(quantisation)
    write_json(target / CONFIG, config)
    if base.source.is_file() and base.weights.eos_token_ids:
        ids = list(base.weights.eos_token_ids)
        write_json(target / GENERATION, {"eos_token_id": ids[0] if len(ids) == 1 else ids})


def write_tokenizer(target: Path, base: LoadedBase) -> None:
    """Copies the base's tokenizer and generation configuration, or makes them from a GGUF file."""
    if base.source.is_dir():
        for file in checkpoint.files_of(base.source):
            if file.suffix != ".safetensors" and file.name not in _WRITTEN:
                shutil.copyfile(file, target / file.name)
        return
    info = TokenizerInfo.read(base.directory)
    if not info.has_tokenizer:
        return
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(base.directory / TOKENIZER),
        chat_template=info.chat_template,
        **info.special_tokens,
    )
    tokenizer.save_pretrained(target)
