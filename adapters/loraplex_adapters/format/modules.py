"""Names of modules: PEFT's spelling of a site, and the shapes of tensors there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from loraplex_model.base.config import (
    BLOCKS,
    LAYER_NORMS,
    LAYER_SITES,
    MODEL,
    MODEL_SITES,
    PROJECTIONS,
    Site,
)
from loraplex_model.base.info import BaseInfo

PREFIX = "base_model.model."
"""PEFT's prefix of a module's path in the Hugging Face model."""

EMBEDDING: Site = (MODEL, "embed_tokens")
HEAD: Site = (MODEL, "lm_head")

VIRTUAL_TOKENS: Site = (MODEL, "virtual_tokens")
"""Site of an adapter's virtual tokens, which is not a module of the base."""

BOTTLENECKS = {"attention_bottleneck": "self_attn", "mlp_bottleneck": "mlp"}
"""The block that each bottleneck is parallel to or follows."""

NORMS = (*LAYER_NORMS, "norm")

_MODEL_PATHS = {
    "embed_tokens": "model.embed_tokens",
    "lm_head": "lm_head",
    "norm": "model.norm",
    "virtual_tokens": "virtual_tokens",
}


@lru_cache(1 << 14)
def module_path(layer: int, module: str) -> str:
    """Returns the module's path in the Hugging Face model, which PEFT's patterns refer to.

    The path of a bottleneck is that of its block.
    """
    if layer == MODEL:
        return _MODEL_PATHS[module]
    below = BOTTLENECKS.get(module) or ".".join(filter(None, (BLOCKS.get(module), module)))
    return f"model.layers.{layer}.{below}"


def base_sites(base: BaseInfo) -> Iterator[Site]:
    """Every module of the base that an adapter may change, in the order of the adapter table."""
    present = {*base.config.projection_shapes(), *base.config.norm_widths()}
    if base.config.num_experts:
        present -= {*base.config.fused["gate_up"], "down_proj"}
    for layer in range(base.config.num_layers):
        for name in LAYER_SITES:
            if name in present:
                yield layer, name
    for name in MODEL_SITES:
        yield MODEL, name


def table_order(site: Site) -> tuple[bool, int, int]:
    """Key that sorts sites in the order of the adapter table, with virtual tokens last."""
    layer, name = site
    if layer == MODEL:
        return True, 0, (*MODEL_SITES, VIRTUAL_TOKENS[1]).index(name)
    return False, layer, LAYER_SITES.index(name)


def role_shapes(site: Site, base: BaseInfo) -> Mapping[str, tuple[int | None, ...]]:
    """Returns the shape of every role that a tensor can have at a site of this base.

    None stands for the inner width: LoRA's rank, a bottleneck's width, the number of rows or of
    virtual tokens. A role that is missing cannot occur at the site.
    """
    _, name = site
    config = base.config
    hidden, vocab = config.hidden_size, config.vocab_size
    if name in PROJECTIONS:
        fan_in, fan_out = config.projection_shapes()[name]
        return {
            "a": (None, fan_in),
            "b": (fan_out, None),
            "e": (None, 1),
            "b_bias": (fan_out,),
            "magnitude": (fan_out,),
            "out_gain": (fan_out, 1),
            "in_gain": (1, fan_in),
            "bias_delta": (1, fan_out),
            "copy": (fan_out, fan_in),
            **({"bias": (fan_out,)} if name in config.biased else {}),
        }
    if name in NORMS:
        width = config.norm_widths().get(name, hidden)
        return {"weight": (width,), "copy": (width,)}
    if name == "embed_tokens":
        matrices = {"a": (None, vocab), "b": (hidden, None)}
        return {**matrices, **_rows(vocab, hidden)}
    if name == "lm_head":
        matrices = {"a": (None, hidden), "b": (vocab, None), "e": (None, 1)}
        return {**matrices, **_rows(vocab, hidden)}
    if name in BOTTLENECKS:
        return {
            "down": (None, hidden),
            "down_bias": (None,),
            "up": (hidden, None),
            "up_bias": (hidden,),
        }
    return {"prompt": (None, hidden), "prefix": (None, 2 * config.num_layers * config.kv_size)}


def _rows(vocab: int, hidden: int) -> Mapping[str, tuple[int | None, ...]]:
    whole = (vocab, hidden)
    return {"weight": whole, "copy": whole, "rows": (None, hidden)}
