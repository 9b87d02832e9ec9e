"""Packed size of an adapter: its bytes on the device, computed from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from loraplex_model.adapters.delta import vector_fields
from loraplex_model.base.config import MODEL, PROJECTIONS, DecoderConfig
from loraplex_model.base.dtypes import ALIGNMENT, ITEM_SIZES
from loraplex_model.base.info import BaseInfo

from loraplex_adapters.format.modules import BOTTLENECKS, NORMS
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.targets import EMBEDDINGS

_VECTORS: Final = vector_fields()


def packed_bytes(modules: Iterable[ModuleSpec], base: BaseInfo) -> int:
    """Bytes of every tensor of every site, each padded to `ALIGNMENT`.

    Matrices, rows and virtual tokens are packed in the base's dtype; gains, biases and token ids
    take 4 bytes an element.
    """
    item = ITEM_SIZES[base.dtype]
    sizes = (
        elements * (4 if name in _VECTORS else item)
        for module in modules
        for name, elements in _elements(module, base.config).items()
    )
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _elements(module: ModuleSpec, config: DecoderConfig) -> Mapping[str, int]:
    """Number of elements of each tensor of a site, by field of the site's `delta_type`."""
    roles, rank = module.tensors, module.rank
    if module.module in PROJECTIONS:
        fan_in, fan_out = config.projection_shapes()[module.module]
        has_factors = ("a" in roles or module.fold is not None) and rank
        found = {"a": rank * fan_in, "b": rank * fan_out} if has_factors else {}
        if roles.keys() & {"magnitude", "out_gain"}:
            found["gain"] = fan_out
        if "in_gain" in roles:
            found["in_gain"] = fan_in
        offset = "magnitude" in roles and module.module in config.biased
        if offset or roles.keys() & {"b_bias", "bias", "bias_delta"}:
            found["bias"] = fan_out
        return found
    if module.module in NORMS:
        return {"weight": roles["weight"].shape[0]}
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
