"""The features of a decoder and of a family in words, made from their fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loraplex_model.base.config import JOINED, NO_ROPE, DecoderConfig, Gate, Norm, NormSpan
from loraplex_model.base.families import Family, WindowLayers

PHRASES: Mapping[str, str] = {
    "qkv_bias": "biases of q, k and v",
    "o_bias": "bias of o",
    "mlp_bias": "biases of the MLP",
    "norm": "LayerNorm",
    "norm_bias": "biases of norms",
    "norm_offset": "1 added to norms' weights",
    "input_norms": "no norms before blocks",
    "output_norms": "norms after blocks",
    "qk_norm": "norms of queries and keys",
    "parallel": "attention and MLP in parallel",
    "gated": "MLP without a gate",
    "joined": "joined modules",
    "embed_scale": "scaled embeddings",
    "residual_scale": "scaled blocks",
    "logit_scale": "scaled logits",
    "logit_softcap": "capped logits",
    "attention_scale": "an attention scale of its own",
    "attention_softcap": "capped attention scores",
    "rope_interleaved": "interleaved rotary pairs",
    "query_scale": "queries scaled by position",
    "num_experts": "mixture of experts",
}
"""What a field of `DecoderConfig` says if it has another value than its default, or is true."""

SILENT = frozenset(
    {
        *("rms_norm_eps", "intermediate_size", "activation"),  # every family has them
        *("scaled_prompts", "experts_per_token", "normalised_experts"),  # go with other fields
        "qk_norm_span",
    }
)
"""Fields of a family's row that its features do not mention."""

_WINDOWS: Mapping[WindowLayers, tuple[str, ...]] = {
    WindowLayers.NONE: (),
    WindowLayers.ALL: ("a window in all layers",),
    WindowLayers.BY_TYPE: ("windows by layer",),
}
_ACTIVATIONS = {Gate.SILU: "SiLU", Gate.GELU: "GELU", Gate.GELU_TANH: "GELU (tanh)"}
_SPANS = {
    NormSpan.HEAD: "of each head, with one weight for all heads",
    NormSpan.EACH: "of each head, with a weight for each",
    NormSpan.ALL: "over all heads",
}


def of_family(family: Family) -> tuple[Sequence[str], Sequence[str]]:
    """The features that all models of a family have, and those that a configuration decides."""
    always = [_fixed(name, value) for name, value in family.fixed.items() if _is_shown(name, value)]
    stated = [PHRASES[name] for name in family.settings if _is_shown(name, True)]
    stated += _WINDOWS[family.windows]
    if family.partial_rotary:
        stated.append("a rotated part of each head")
    if family.layer_ropes is not None:
        stated.append("layers without positions")
    return always, stated


def _is_shown(name: str, value: Any) -> bool:
    return name not in SILENT and (value is not False or name in ("input_norms", "gated"))


def _fixed(name: str, value: Any) -> str:
    if name == "joined":
        return "joined " + " and ".join(JOINED[fused] for fused in value)
    return PHRASES[name]


def of_config(config: DecoderConfig) -> Mapping[str, str]:
    """The features of one model, by subject."""
    return {
        "layers": _shape(config),
        "attention": _attention(config),
        "positions": _positions(config),
        "blocks": ", ".join(_blocks(config)),
    }


def _shape(config: DecoderConfig) -> str:
    width = f"{config.num_layers} layers of width {config.hidden_size:,}"
    activation = _ACTIVATIONS[config.activation]
    gate = "with a gate" if config.gated else "without a gate"
    mlp = f"{config.intermediate_size:,} ({activation}, {gate})"
    if config.num_experts:
        chosen = f"{config.experts_per_token} of {config.num_experts} experts for each token"
        mlp = f"{chosen}, each of width {mlp}"
    else:
        mlp = f"MLP of width {mlp}"
    tied = "tied head" if config.tie_embeddings else "a head of its own"
    return f"{width}, {mlp}, vocabulary of {config.vocab_size:,}, {tied}"


def _attention(config: DecoderConfig) -> str:
    parts = [
        f"{config.num_heads} heads of {config.head_dim} over {config.num_kv_heads} key-value heads"
    ]
    windows = Counter(window for window in config.sliding_windows if window is not None)
    for window, count in windows.items():
        layers = "all layers" if count == config.num_layers else f"{count} layers"
        parts.append(f"a window of {window:,} tokens in {layers}")
    if not windows:
        parts.append("no windows")
    if config.qk_norm:
        parts.append(f"{PHRASES['qk_norm']} {_SPANS[config.qk_norm_span]}")
    if config.attention_scale:
        parts.append(f"scale {config.attention_scale:.4g}")
    if config.attention_softcap:
        parts.append(f"scores capped at {config.attention_softcap:g}")
    return ", ".join(parts)


def _positions(config: DecoderConfig) -> str:
    parts = [f"{config.max_positions:,} tokens of context"]
    names = ("rotary frequencies", "other rotary frequencies")
    used = Counter(config.layer_rope(layer) for layer in range(config.num_layers))
    for index, rope in enumerate(config.ropes):
        width = 2 * len(rope.inv_freq)
        name = names[min(index, 1)]
        part = f"{name} for {width} of {config.head_dim} numbers of a head"
        if rope.scale != 1:
            part += f", scaled by {rope.scale:.4g}"
        where = "" if used[index] == config.num_layers else f" in {used[index]} layers"
        parts.append(part + where)
    if config.rope_interleaved:
        parts.append("in interleaved pairs")
    if used[NO_ROPE]:
        parts.append(f"none in {used[NO_ROPE]} layers")
    if config.long_rope is not None:
        parts.append(f"others for sequences of more than {config.short_positions:,} tokens")
    if config.query_scale:
        parts.append(PHRASES["query_scale"])
    return ", ".join(parts)


def _blocks(config: DecoderConfig) -> Iterator[str]:
    yield PHRASES["norm"] if config.norm is Norm.LAYER else "RMSNorm"
    if config.input_norms:
        yield "before and after blocks" if config.output_norms else "before blocks"
    else:
        yield "after blocks"
    if config.norm_offset:
        yield f"{config.norm_offset:g} added to norms' weights"
    for name in ("norm_bias", "parallel", "qkv_bias", "o_bias", "mlp_bias"):
        if getattr(config, name):
            yield PHRASES[name]
    if config.joined:
        yield _fixed("joined", config.joined)
    for name, what in (("embed", "embeddings"), ("residual", "blocks"), ("logit", "logits")):
        scale = getattr(config, f"{name}_scale")
        if scale != 1:
            yield f"{what} scaled by {scale:.4g}"
    if config.logit_softcap:
        yield f"logits capped at {config.logit_softcap:g}"
