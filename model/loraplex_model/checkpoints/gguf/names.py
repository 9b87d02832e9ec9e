"""llama.cpp's names of tensors, from the tables of the `gguf` package.

A file is taken only if each of its tensors is used or known to be harmless: a tensor that is left
out would make the file another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from loraplex_model.base import families
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.base.families import Family
from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies (Llama 3's scaling), float32 [head_dim / 2]."""

EMBED = "token_embd.weight"

_HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
"""Rotary frequencies of early converters. llama.cpp skips them: they follow from the metadata."""

_EXPERT = re.compile(r"blk\.\d+\.(ffn_\w+_(exps|shexp|chexps)|ffn_gate_inp\w*|ffn_\w+\.\d+)\..*")
_LAYER = re.compile(r"blk\.(\d+)\..*")

_OPTIONAL_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj")


class GgufNames:
    """GgufNames in the files of one GGUF architecture.

    Raises `Refusal` (MODEL_UNSUPPORTED) if the `gguf` package does not know the architecture.
    """

    def __init__(self, architecture: str, layers: int) -> None:
        from gguf.constants import MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        if architecture not in kinds:
            raise model_unsupported(f"the gguf package does not know {architecture!r}; update it")
        self._map = get_tensor_name_map(kinds[architecture], layers)

    def of(self, tensor: str) -> str | None:
        """The name of a tensor of a Hugging Face checkpoint; None if the files never hold it."""
        module, _, kind = tensor.rpartition(".")
        found = self._map.get_name(module)
        return None if found is None else f"{found}.{kind}"


def assign(
    path: Path, tensors: Collection[str], architecture: str, family: Family, layers: int
) -> tuple[Mapping[str, str], frozenset[str]]:
    """The GGUF name of every tensor that the decoder uses, by its Hugging Face name.

    The second value are the Hugging Face names of biases that the file lacks while it has others
    of the same option: they are zero.

    Raises `Refusal`: MODEL_INVALID for a missing tensor, MODEL_UNSUPPORTED for one that would not
    be used. Both name it.
    """
    names = GgufNames(architecture, layers)
    found, absent = dict[str, str](), set[str]()
    for tensor, is_required in _tensors(family, layers):
        name = names.of(tensor)
        if name is not None and name in tensors:
            found[tensor] = name
        elif is_required:
            raise model_invalid(f"{path} has no tensor {name} ({tensor})")
        elif name is not None:
            absent.add(tensor)
    is_biased = any(tensor.endswith(".bias") for tensor in found)
    for name in sorted(set(tensors) - set(found.values())):
        if name != ROPE_FACTORS and not _HARMLESS.fullmatch(name):
            raise _unused(path, name, architecture, layers)
    zeros = {tensor for tensor in absent if tensor.endswith(".bias")} if is_biased else set[str]()
    return found, frozenset(zeros)


def _tensors(family: Family, layers: int) -> Iterator[tuple[str, bool]]:
    """`(Hugging Face name, whether it is required)` of every tensor that the family can have."""
    yield families.EMBED, True
    yield families.NORM, True
    yield families.LM_HEAD, False
    norms = ["input_layernorm", "post_attention_layernorm", *("q_norm", "k_norm") * family.qk_norm]
    for layer in range(layers):
        for module in (*norms, *PROJECTIONS):
            yield families.tensor_name(layer, module), True
        for module in _OPTIONAL_BIASES:
            if family.qkv_bias and module != "o_proj":
                yield families.tensor_name(layer, module, "bias"), True
            elif "attention_bias" in family.bias_options:
                yield families.tensor_name(layer, module, "bias"), False


def _unused(path: Path, name: str, architecture: str, layers: int) -> Refusal:
    if _EXPERT.fullmatch(name):
        return model_unsupported(
            f"{path} is a mixture of experts ({name}), which is not read from GGUF files"
        )
    layer = _LAYER.fullmatch(name)
    if layer and int(layer[1]) >= layers:
        return model_invalid(f"{path} holds {name}, but states {layers} layers")
    return model_unsupported(
        f"{path} holds {name}, which the decoder of {architecture} does not use; without it, the "
        "answers would be those of another model"
    )
