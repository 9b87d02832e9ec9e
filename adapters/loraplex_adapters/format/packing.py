"""Packed size of an adapter: bytes on the device, from its tensors' shapes and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraplex_model.base.config import PROJECTIONS

from loraplex_adapters.format.modules import BOTTLENECKS, NORMS
from loraplex_adapters.format.spec import ITEM_SIZES, PACK_ALIGNMENT, BaseShapes, ModuleSpec


def packed_bytes(modules: Iterable[ModuleSpec], base: BaseShapes) -> int:
    """Bytes of every field of every site, each padded to `PACK_ALIGNMENT`.

    Matrices, rows and virtual tokens are packed in the base's dtype; gains, biases and token ids
    are 4 bytes an element.
    """
    item = ITEM_SIZES[base.dtype]
    sizes = (
        elements * (item if wide else 4)
        for module in modules
        for elements, wide in _fields(module, base)
    )
    return sum(-(-size // PACK_ALIGNMENT) * PACK_ALIGNMENT for size in sizes)


def _fields(module: ModuleSpec, base: BaseShapes) -> Iterator[tuple[int, bool]]:
    """(elements, whether they are of the compute dtype) of every field of a site."""
    roles = module.tensors
    if module.module in PROJECTIONS:
        fan_in, fan_out = base.projections[module.module]
        if "a" in roles and module.rank:
            yield module.rank * fan_in, True
            yield module.rank * fan_out, True
        if roles.keys() & {"magnitude", "out_gain"}:
            yield fan_out, False
        if "in_gain" in roles:
            yield fan_in, False
        offset = "magnitude" in roles and module.module in base.biased
        if offset or roles.keys() & {"b_bias", "bias", "bias_delta"}:
            yield fan_out, False
    elif module.module in NORMS:
        yield roles["weight"].shape[0], False
    elif module.module in BOTTLENECKS:
        yield module.rank * base.hidden_size, True
        yield module.rank * base.hidden_size, True
        if "down_bias" in roles:
            yield module.rank, False
        if "up_bias" in roles:
            yield base.hidden_size, False
    elif "a" in roles:
        if module.rank:
            yield module.rank * base.vocab_size, True
            yield module.rank * base.hidden_size, True
    elif "weight" in roles:
        yield base.vocab_size, False
        yield base.vocab_size * base.hidden_size, True
    elif "rows" in roles:
        yield len(module.token_ids), False
        yield len(module.token_ids) * base.hidden_size, True
    elif "prompt" in roles:
        yield roles["prompt"].shape[0] * base.hidden_size, True
    elif "prefix" in roles:
        half = roles["prefix"].shape[0] * base.num_layers * base.kv_size
        yield half, True
        yield half, True
