"""Packed size of an adapter: its bytes on the device, computed from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Final

from loraplex_model.adapters.delta import vector_fields
from loraplex_model.base.config import MODEL, DecoderConfig
from loraplex_model.base.dtypes import ALIGNMENT, ITEM_SIZES
from loraplex_model.base.info import BaseInfo

from loraplex_adapters.format.modules import (
    BOTTLENECKS,
    EXPERT_MATRICES,
    MATRICES,
    NORMS,
    role_shapes,
)
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.targets import EMBEDDINGS

_VECTORS: Final = vector_fields()


def packed_bytes(modules: Iterable[ModuleSpec], base: BaseInfo) -> int:
    """Bytes of every tensor of every site, each padded to `ALIGNMENT`.

    Matrices, rows and virtual tokens are packed in the base's dtype; gains, biases and token ids
    take 4 bytes an element. A module that the decoder divides into several is packed as these, with
    one A and one gain of the input for all.
    """
    item = ITEM_SIZES[base.dtype]
    sizes = (
        elements * (4 if name in _VECTORS else item)
        for module in modules
        for name, elements in _tensors(module, base)
    )
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _tensors(module: ModuleSpec, base: BaseInfo) -> Iterator[tuple[str, int]]:
    """Fields and numbers of elements of the tensors that a site is packed as."""
    config = base.config
    if module.module in EXPERT_MATRICES:
        ranks = module.rank * config.num_experts
        shapes = role_shapes((module.layer, module.module), base)
        yield "a", ranks * (shapes["a"][1] or 0)
        parts = 2 if module.module == "experts_gate_up" else 1
        for _ in range(parts):
            yield "b", ranks * ((shapes["b"][0] or 0) // parts)
        return
    if module.module not in MATRICES:
        yield from _elements(module, config).items()
        return
    roles, rank, name = module.tensors, module.rank, module.module
    fan_in, _ = config.module_shapes()[name]
    has_factors = bool(rank) and ("a" in roles or module.fold is not None)
    offset = "magnitude" in roles and name in config.biased
    present = {
        "b": has_factors,
        "gain": bool(roles.keys() & {"magnitude", "out_gain"}),
        "bias": bool(offset or roles.keys() & {"b_bias", "bias", "bias_delta"}),
    }
    if has_factors:
        yield "a", rank * fan_in
    if "in_gain" in roles:
        yield "in_gain", fan_in
    for part in config.parts_of(name):
        _, _, fan_out = config.place(part)
        for field, is_present in present.items():
            if is_present:
                yield field, fan_out * (rank if field == "b" else 1)


def _elements(module: ModuleSpec, config: DecoderConfig) -> Mapping[str, int]:
    """Number of elements of each tensor of a site, by field of the site's `delta_type`."""
    roles, rank = module.tensors, module.rank
    if module.module in NORMS:
        return {role: prod(roles[role].shape) for role in ("weight", "bias") if role in roles}
    if module.module in BOTTLENECKS:
        found = {"down": rank * config.hidden_size, "up": rank * config.hidden_size}
        found |= {"down_bias": rank} if "down_bias" in roles else {}
        return found | ({"up_bias": config.hidden_size} if "up_bias" in roles else {})
    if (MODEL, module.module) in EMBEDDINGS:
        found = {"a": rank * config.vocab_size, "b": rank * config.hidden_size}
        found = found if ("a" in roles or module.fold is not None) and rank else {}
        if tokens := _changed_tokens(module, config):
            found |= {"token_ids": tokens, "rows": tokens * config.hidden_size}
        return found
    if "prompt" in roles:
        return {"embeddings": roles["prompt"].shape[0] * config.hidden_size}
    half = roles["prefix"].shape[0] * config.num_layers * config.kv_size if "prefix" in roles else 0
    return {"keys": half, "values": half}


def _changed_tokens(module: ModuleSpec, config: DecoderConfig) -> int:
    """Number of rows of embeddings or head that are replaced."""
    if "weight" not in module.tensors:
        return len(module.token_ids) if "rows" in module.tensors else 0
    if not module.changed_rows:
        return config.vocab_size
    return len({*module.changed_rows, *module.token_ids})
