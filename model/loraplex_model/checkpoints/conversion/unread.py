"""Tensors of a checkpoint that the decoder does not read: ignored if harmless, else refused.

transformers ignores every tensor that its model does not have, with a warning. Most of them show
that a checkpoint is not what its configuration says; without them, it would answer as another
model. So only the kinds in `_HARMLESS` and `_HARMLESS_ENDINGS` are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported

_HARMLESS_ENDINGS = (
    "rotary_emb.inv_freq",  # frequencies, which older versions of transformers saved; computed here
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.masked_bias",  # constants of a causal mask
    "position_ids",  # 0, 1, 2, ...
)

_HARMLESS = (
    "mtp.",  # heads that predict several tokens at once, for speculation only
    "model.mtp.",
    "v_head.",  # the value head of a model that was trained by reinforcement
    "value_head.",
)

_TOWERS = (
    "vision",
    "visual",
    "multi_modal",
    "audio",
    "embed_vision",
    "embed_audio",
    "mm_projector",
)
"""Beginnings of the parts of a multimodal checkpoint that its text decoder does not use."""

_ADAPTERS = (
    ".lora_",
    ".base_layer.",
    "base_model.",
    ".ia3_",
    ".hada_",
    ".lokr_",
    "prompt_embeddings",
)
_EXPERTS = (".experts.", ".block_sparse_moe.", ".shared_expert", ".mlp.gate.", ".mlp.router.")
_QUANTISED = (
    ".SCB",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    "_scale",
    "_scale_inv",
    "_scale_2",
    "_zero_point",
    "_packed",
    "weight_format",
    ".absmax",
    "quant_map",
    "__nf4",
    "__fp4",
)
"""Endings of what other methods of quantisation store with a weight, or instead of it."""

_LAYER = "model.layers."
_SHOWN = 3


def refuse_unread(
    names: Collection[str], raw: Mapping[str, Any], architecture: str, layers: int
) -> None:
    """Refuses tensors that are not read, by their Hugging Face names, unless they are harmless.

    Args:
        raw: the contents of config.json.
        layers: number of layers of the decoder.

    Raises:
        Refusal: MODEL_INVALID or MODEL_UNSUPPORTED, with the names of the first ones.
    """
    is_multimodal = any(f"{part}_config" in raw for part in ("text", "vision", "audio"))
    ignored = _prediction_layers(raw, layers)
    left = [
        name
        for name in sorted(names)
        if not name.endswith(_HARMLESS_ENDINGS)
        and not name.startswith((*_HARMLESS, *ignored))
        and not (is_multimodal and name.removeprefix("model.").startswith(_TOWERS))
    ]
    if left:
        raise _refusal(left, architecture, layers)


def _refusal(left: list[str], architecture: str, layers: int) -> Refusal:
    shown = ", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" * (len(left) > _SHOWN))
    if any(part in name for name in left for part in _ADAPTERS):
        return model_unsupported(
            f"the checkpoint holds tensors of an adapter ({shown}); merge the adapter into its "
            "base (merge_and_unload in PEFT), or serve the base and register the adapter"
        )
    beyond = [number for name in left if (number := _layer(name)) is not None and number >= layers]
    if beyond:
        return model_invalid(
            f"the checkpoint has a layer {max(beyond)} ({shown}), but its configuration has "
            f"num_hidden_layers {layers}; correct it, or fetch the model again"
        )
    if any(part in name for name in left for part in _EXPERTS):
        return model_unsupported(
            f"the checkpoint holds experts ({shown}), which a {architecture} of its configuration "
            "does not have; choose a model without experts, or correct its config.json"
        )
    if any(name.endswith(_QUANTISED) for name in left):
        return model_unsupported(
            f"the checkpoint is quantised in a way that is not supported ({shown}); use a "
            "checkpoint that is not quantised, or one in bitsandbytes NF4"
        )
    return model_invalid(
        f"the checkpoint has tensors that a {architecture} of its configuration does not have "
        f"({shown}), and without them it would answer as another model; correct its config.json, "
        "or fetch the model again"
    )


def _prediction_layers(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Layers after the decoder's that predict several tokens at once, which are not computed."""
    more = raw.get("num_nextn_predict_layers")
    count = min(more, 16) if isinstance(more, int) else 0
    return tuple(f"{_LAYER}{layer}." for layer in range(layers, layers + count))


def _layer(name: str) -> int | None:
    """The number of the layer that a tensor is in; None for a tensor outside of layers."""
    number = name.partition(_LAYER)[2].partition(".")[0]
    return int(number) if number.isdecimal() and len(number) < 10 else None
