"""How a GGUF file's vocabulary splits text before its merges, where transformers does not have it.

A file names the way (`tokenizer.ggml.pre`) for vocabularies of bytes. transformers reads the
commonest, and splits as GPT-2 does for all others, which gives other tokens than those on which the
model was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex_model.base.refusal import model_unsupported
from loraplex_model.checkpoints.gguf.header import shown
from loraplex_model.checkpoints.gguf.parts import read_parts

_AS = {
    "glm4": "llama-bpe",
    "chatglm-bpe": "llama-bpe",
    "stablelm2": "qwen2",
    "hunyuan": "qwen2",
}
"""Ways that transformers does not have, and equal ones that it has."""

_DIGITS = frozenset({"starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Ways that take every digit by itself, and the rest as GPT-2 does."""

_AS_GPT_2 = frozenset(
    {
        *("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "default"),
        "smollm",  # takes digits alone, but the default model has been served without that
    }
)

_BEGINS = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
"""Ways of vocabularies whose texts begin with a token, unless the file says otherwise."""


def options_of(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """A file's metadata, and the options with which transformers' tokenizer is made of it.

    Raises `Refusal` (MODEL_UNSUPPORTED) for an unknown way of splitting text.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    metadata, _ = read_parts(path)
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return metadata, {}
    way = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(way, str) or way not in {
        *GGUF_PRE_TOKENIZER_SPLITS,
        *_AS,
        *_DIGITS,
        *_AS_GPT_2,
    }:
        raise model_unsupported(
            f"{path} has tokenizer.ggml.pre = {shown(way)}, a way of splitting text that is not "
            "known; use the model's safetensors"
        )
    begins = way in _BEGINS and "tokenizer.ggml.add_bos_token" not in metadata
    return metadata, {"add_bos_token": True} if begins else {}


def correct(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Changes transformers' tokenizer of a file to split text as the file says."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    backend, kind = tokenizer.backend_tokenizer, metadata.get("tokenizer.ggml.model")
    way = metadata.get("tokenizer.ggml.pre")
    if kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _without_prefix(backend)
    if kind != "gpt2":
        return
    first: Any = None
    if way in _DIGITS:
        first, by_regex = pre_tokenizers.Digits(individual_digits=True), True
    elif way in _AS:
        split = Regex(GGUF_PRE_TOKENIZER_SPLITS[_AS[way]])
        first, by_regex = pre_tokenizers.Split(split, behavior="isolated"), False
    if first is not None:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, last])


def _without_prefix(backend: Any) -> None:
    """Texts do not begin with a blank that their first word gets elsewhere."""
    from tokenizers import pre_tokenizers
    from transformers import LlamaTokenizer

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        plain = LlamaTokenizer(add_prefix_space=False).backend_tokenizer
        backend.pre_tokenizer, backend.decoder = plain.pre_tokenizer, plain.decoder
