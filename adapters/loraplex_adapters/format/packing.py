"""Packed size of an adapter: bytes on the device, from its tensors' shapes and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraplex_model.base.config import PROJECTIONS, DecoderConfig
from loraplex_model.base.dtypes import ALIGNMENT, ITEM_SIZES
from loraplex_model.base.info import BaseInfo

from loraplex_adapters.format.modules import BOTTLENECKS, NORMS
from loraplex_adapters.format.spec import ModuleSpec


def packed_bytes(modules: Iterable[ModuleSpec], base: BaseInfo) -> int:
    """Bytes of every field of every site, each padded to `ALIGNMENT`.

    Matrices, rows and virtual tokens are packed in the base's dtype; gains, biases and token ids
    are 4 bytes an element.
    """
    item = ITEM_SIZES[base.dtype]
    sizes = (
        elements * (item if wide else 4)
        for module in modules
        for elements, wide in _fields(module, base.config)
    )
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _fields(module: ModuleSpec, config: DecoderConfig) -> Iterator[tuple[int, bool]]:
    """(elements, whether they are of the compute dtype) of every field of a site."""
    roles = module.tensors
    if module.module in PROJECTIONS:
        fan_in, fan_out = config.projection_shapes()[module.module]
        if "a" in roles and module.rank:
            yield module.rank * fan_in, True
            yield module.rank * fan_out, True
        if roles.keys() & {"magnitude", "out_gain"}:
            yield fan_out, False
        if "in_gain" in roles:
            yield fan_in, False
        offset = "magnitude" in roles and module.module in config.biased
        if offset or roles.keys() & {"b_bias", "bias", "bias_delta"}:
            yield fan_out, False
    elif module.module in NORMS:
        yield roles["weight"].shape[0], False
    elif module.module in BOTTLENECKS:
        yield module.rank * config.hidden_size, True
        yield module.rank * config.hidden_size, True
        if "down_bias" in roles:
            yield module.rank, False
        if "up_bias" in roles:
            yield config.hidden_size, False
    elif "a" in roles:
        if module.rank:
            yield module.rank * config.vocab_size, True
            yield module.rank * config.hidden_size, True
    elif "weight" in roles:
        yield config.vocab_size, False
        yield config.vocab_size * config.hidden_size, True
    elif "rows" in roles:
        yield len(module.token_ids), False
        yield len(module.token_ids) * config.hidden_size, True
    elif "prompt" in roles:
        yield roles["prompt"].shape[0] * config.hidden_size, True
    elif "prefix" in roles:
        half = roles["prefix"].shape[0] * config.num_layers * config.kv_size
        yield half, True
        yield half, True
