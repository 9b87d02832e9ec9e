"""llama.cpp's names of tensors, from the tables of the `gguf` package.

A file is taken only if each of its tensors is used or known to be harmless: a tensor that is left
out would make the file another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex_model.base import families
from loraplex_model.base.config import JOINED, DecoderConfig
from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported

EMBED, HEAD = "token_embd.weight", "output.weight"

FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies (Llama 3's scaling), float32 [rotated / 2]."""

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Divisors for sequences of more tokens than the original context, and for others (LongRoPE)."""

_HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
"""Rotary frequencies of early converters. llama.cpp skips them: they follow from the metadata."""

_EXPERT = re.compile(r"blk\.\d+\.(ffn_\w+_(exps|shexp|chexps)|ffn_gate_inp\w*|ffn_\w+\.\d+)\..*")
_EARLY_EXPERT = re.compile(r"blk\.\d+\.ffn_\w+\.\d+\.weight")
_BIAS = re.compile(r"blk\.\d+\.(\w+)\.bias")
_LAYER = re.compile(r"blk\.(\d+)\..*")

BIASED = {
    "qkv_bias": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "o_bias": ("attn_output",),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""The modules whose biases a field of `DecoderConfig` stands for."""


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Rows `first` to `end` of a tensor; all if `end` is None. `end` 0 stands for `first` zeros.

    With `one` they are a single row, without the dimension of rows.
    """

    tensor: str
    first: int = 0
    end: int | None = None
    one: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether it stands for zeros, which no file holds."""
        return self.end == 0


Pieces = tuple[TensorPiece, ...]
"""What a Hugging Face tensor is made of, in order."""


class GgufNames:
    """Names in the files of one GGUF architecture.

    Raises `Refusal` (MODEL_UNSUPPORTED) if the `gguf` package does not know the architecture.
    """

    def __init__(self, architecture: str, layers: int) -> None:
        from gguf.constants import MODEL_ARCH_NAMES
        from gguf.tensor_mapping import get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        if architecture not in kinds:
            raise model_unsupported(f"llama.cpp has no architecture {architecture!r}")
        self._map = get_tensor_name_map(kinds[architecture], layers)

    def of(self, tensor: str) -> str | None:
        """The name of a tensor of a Hugging Face checkpoint; None if the files never hold it."""
        module, _, kind = tensor.rpartition(".")
        found = self._map.get_name(module)
        return None if found is None else f"{found}.{kind}"


def biased_modules(tensors: Collection[str]) -> set[str]:
    """llama.cpp's names of the modules that have a bias in any layer."""
    found = (_BIAS.fullmatch(name) for name in tensors)
    return {match[1] for match in found if match}


def assign(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    architecture: str,
    config: DecoderConfig,
    used: Collection[str],
) -> Mapping[str, Pieces]:
    """The pieces of every tensor that the decoder reads, by its Hugging Face name.

    Args:
        shapes: of all tensors in the file, by their names.
        used: those that are used in another way.

    Raises:
        Refusal: MODEL_INVALID for a missing tensor, MODEL_UNSUPPORTED for one that would not be
            used. Both name it.
    """
    for name in sorted(shapes):
        if _EARLY_EXPERT.fullmatch(name):
            raise model_unsupported(
                f"{path} is a mixture of experts with tensors of its own for each expert ({name}), "
                "as early converters wrote it; convert the model again"
            )
    layers = config.num_layers
    place = _Places(path, shapes, architecture, config)
    found: dict[str, Pieces] = {}
    for layer, module, kind in _wanted(config):
        for tensor, pieces in place.of(layer, module, kind):
            if pieces is None:
                name = place.names.of(tensor) or tensor
                raise model_invalid(f"{path} has no tensor {name} ({tensor})")
            found[tensor] = pieces
    taken = {piece.tensor for pieces in found.values() for piece in pieces} | {*used}
    for name in sorted(shapes.keys() - taken):
        if not _HARMLESS.fullmatch(name):
            raise _unused(path, name, architecture, layers)
    return found


def _wanted(config: DecoderConfig) -> Iterator[tuple[int | None, str, str]]:
    """Layer, module and kind of every tensor that the conversion reads.

    The layer is None for the model's own, whose module is their whole name.
    """
    yield None, families.EMBED, ""
    yield None, families.NORM, ""
    if config.norm_bias:
        yield None, families.NORM_BIAS, ""
    if not config.tie_embeddings:
        yield None, families.LM_HEAD, ""
    for layer in range(config.num_layers):
        for site in config.norm_widths():
            yield layer, site, "weight"
            if config.norm_bias and site not in ("q_norm", "k_norm"):
                yield layer, site, "bias"
        for module in config.module_shapes():
            yield layer, module, "weight"
            if module in config.biased:
                yield layer, module, "bias"
        if config.num_experts:
            yield layer, "router", "weight"


class _Places:
    """Finds the tensors of a file that a Hugging Face tensor is made of."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        architecture: str,
        config: DecoderConfig,
    ) -> None:
        self.names = GgufNames(architecture, config.num_layers)
        self._path, self._tensors, self._config = path, shapes, config
        family = families.FAMILIES[config.architecture]
        biased = {field for field in BIASED if field not in family.fixed}
        self._may_lack = {f"{name}.bias" for field in biased for name in BIASED[field]}

    def of(self, layer: int | None, module: str, kind: str) -> Iterator[tuple[str, Pieces | None]]:
        """Hugging Face's tensors of a module, and the pieces of each; None if it is missing."""
        if layer is None:
            yield module, self._whole(module)
            return
        tensor = families.tensor_name(self._config.architecture, layer, module, kind)
        if "{head}" in tensor:
            count = self._config.norm_widths()[module] // self._config.head_dim
            yield from self._each(tensor, ".norms.{head}", count)
        elif "{expert}" in tensor:
            yield from self._each(tensor, ".{expert}", self._config.num_experts)
        else:
            yield tensor, self._whole(tensor) or self._parts(layer, module, kind)

    def _each(self, tensor: str, number: str, count: int) -> Iterator[tuple[str, Pieces | None]]:
        """The tensors of all heads or experts, which the file holds as the rows of one."""
        stacked = tensor.replace(number, "")
        name = self.names.of(stacked)
        if name is None or name not in self._tensors:
            yield stacked, None
            return
        if self._tensors[name][:1] != (count,):
            raise model_invalid(
                f"{self._path}: {name} has shape {list(self._tensors[name])}, but the settings "
                f"need {count} in its first dimension"
            )
        for i in range(count):
            yield tensor.format(head=i, expert=i), (TensorPiece(name, i, i + 1, one=True),)

    def _whole(self, tensor: str) -> Pieces | None:
        # in the tables, the files of some architectures never have a head of their own
        name = HEAD if tensor == families.LM_HEAD else self.names.of(tensor)
        return (TensorPiece(name),) if name is not None and name in self._tensors else None

    def _parts(self, layer: int, module: str, kind: str) -> Pieces | None:
        """A module that the file holds in parts, or in one with others, or as a bias of zeros."""
        at, config = f"blk.{layer}", self._config
        parts = [f"{at}.{name}.{kind}" for name in BIASED["qkv_bias"][:3]]
        joined = f"{at}.attn_qkv.{kind}"
        if module == JOINED["qkv"] and all(part in self._tensors for part in parts):
            return tuple(TensorPiece(part) for part in parts)
        if module in ("q_proj", "k_proj", "v_proj") and joined in self._tensors:
            _, first, count = config.place(module)
            if (*self._tensors[joined], 0)[0] < first + count:
                raise model_invalid(
                    f"{self._path}: {joined} has shape {list(self._tensors[joined])}, but the "
                    f"settings need {first + count} rows or more"
                )
            return (TensorPiece(joined, first, first + count),)
        name = self.names.of(families.tensor_name(config.architecture, layer, module, "bias"))
        if kind == "bias" and name is not None and name.split(".", 2)[2] in self._may_lack:
            return (TensorPiece("", config.module_shapes()[module][1], 0),)
        return None


def _unused(path: Path, name: str, architecture: str, layers: int) -> Refusal:
    if _EXPERT.fullmatch(name):
        return model_unsupported(
            f"{path} is a mixture of experts ({name}) of a kind that is not supported"
        )
    layer = _LAYER.fullmatch(name)
    if layer and int(layer[1]) >= layers:
        return model_invalid(f"{path} holds {name}, but states {layers} layers")
    return model_unsupported(
        f"{path} holds {name}, which the decoder of {architecture} does not use; without it, the "
        "answers would be those of another model"
    )
