"""From a Hugging Face configuration to a `DecoderConfig`, by the rows of `families`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from loraplex_model.base.config import NO_ROPE, DecoderConfig, Rope
from loraplex_model.base.families import ACTIVATIONS, FAMILIES, TEXT_PARTS, Family, WindowLayers
from loraplex_model.base.fields import check_decoder, check_fields
from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported

SCALINGS = ("linear", "llama3", "yarn", "dynamic", "longrope")
"""Supported kinds of RoPE scaling.

"dynamic" changes the frequencies only beyond the context for which the checkpoint was made, which
is never served. "longrope" has two sets of them, by the length of the whole sequence.
"""

_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What entries of a configuration raise that are missing, of another type, or do not fit others."""


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a `config.json`.

    Raises:
        Refusal: the architecture is not supported, needs code of its own, or has a feature that
            the decoder lacks.
    """
    is_mistral = raw.get("architectures") in (None, [], ["MistralForCausalLM"])
    if is_mistral and raw.get("model_type") == "mistral" and "layer_types" in raw:
        # Ministral 8B states the wrong name; transformers distinguishes the two by this entry, too
        raw = {**raw, "architectures": ["MinistralForCausalLM"], "model_type": "ministral"}
    raw = text_part(raw)
    architecture = _architecture(raw)
    check_fields(raw)
    config = _parse(architecture, raw)
    try:
        decoder = _decoder(architecture, config)
    except _MALFORMED as error:
        raise _unreadable(error) from error
    check_decoder(decoder)
    return decoder


def _decoder(architecture: str, config: Any) -> DecoderConfig:
    """The decoder of a configuration as transformers reads it; some of its values are unchecked."""
    family = FAMILIES[architecture]
    heads = config.num_attention_heads
    width = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // heads
    values: dict[str, Any] = {
        "rms_norm_eps": getattr(config, "rms_norm_eps", 0.0),
        "intermediate_size": config.intermediate_size,
        "qkv_bias": False,
        "o_bias": False,
        "qk_norm": False,
        **family.fixed,
        **_settings(family, config),
    }
    _refuse_unsupported(architecture, config, width, values)
    values |= _rotary(family, config)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=width,
        tie_embeddings=bool(config.tie_word_embeddings),
        sliding_windows=_sliding_windows(family, config),
        **values,
    )


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text decoder, which multimodal models have in a part of theirs."""
    stated = raw.get("architectures") or []
    if not isinstance(stated, list) or not all(isinstance(each, str) for each in stated):
        raise model_invalid(
            "the model's configuration has architectures that are not a list of names; correct "
            "it, or fetch the model again"
        )
    if "text_config" not in raw or not set(stated) <= set(TEXT_PARTS):
        return raw
    if not isinstance(raw["text_config"], dict):
        raise model_invalid(
            "the model's configuration has a text_config that is no object; fetch the model again"
        )
    part = dict(raw["text_config"])
    part.pop("architectures", None)
    for key in ("quantization_config", "auto_map"):
        if key in raw:
            part.setdefault(key, raw[key])
    # the head belongs to the whole model, whose configurations tie it if they do not say
    part["tie_word_embeddings"] = raw.get("tie_word_embeddings", True)
    return part


def _architecture(raw: Mapping[str, Any]) -> str:
    supported = ", ".join(FAMILIES)
    if "auto_map" in raw:
        raise model_unsupported(
            "the model needs code of its own (auto_map), which is never run; "
            f"supported architectures: {supported}"
        )
    stated = raw.get("architectures") or []
    if not stated:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        kind = str(raw.get("model_type", "none stated"))
        stated = [by_type.get(kind, kind)]
    if len(stated) != 1 or stated[0] not in FAMILIES:
        raise model_unsupported(
            f"architecture {', '.join(map(str, stated))} is not supported; supported: {supported}"
        )
    return str(stated[0])


def _parse(architecture: str, raw: Mapping[str, Any]) -> Any:
    """The configuration as transformers reads it, with defaults and older spellings resolved."""
    from transformers import CONFIG_MAPPING

    kind = FAMILIES[architecture].model_type
    if raw.get("model_type", kind) != kind:
        raise model_invalid(
            f"config.json states {architecture} but model_type {raw['model_type']!r}"
        )
    try:
        # transformers writes into what it reads
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:  # transformers raises many kinds for a malformed configuration
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> Refusal:
    """The refusal of a configuration that transformers cannot read, with its reason in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError) and said.strip("'").isidentifier():
        said = f"{error.args[0]} is missing"
    return model_invalid(
        f"the model's configuration cannot be read: {said}; correct it, or fetch the model again"
    )


def _settings(family: Family, config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    activation = "hidden_act"
    for name, source in family.settings.items():
        if name == "activation":
            activation = str(source)
            continue
        value = source(config) if callable(source) else getattr(config, source)
        if value is not None:
            values[name] = value
    stated = getattr(config, activation)
    if stated not in ACTIVATIONS:
        raise model_unsupported(
            f"{activation} {stated!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return values | {"activation": ACTIVATIONS[stated]}


def _refuse_unsupported(
    architecture: str, config: Any, width: int, values: Mapping[str, Any]
) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    faults = {
        "use_bidirectional_attention": getattr(config, "use_bidirectional_attention", False),
        "an odd width": any(
            size % 2 for size in (width, config.hidden_size, values["intermediate_size"])
        ),
        f"{heads} heads over {kv_heads} key-value heads": heads % (kv_heads or heads) != 0,
        "layers with and without experts": getattr(config, "mlp_only_layers", None)
        or getattr(config, "decoder_sparse_step", 1) != 1,
        "an output head that has a scale of 0": values.get("logit_scale") == 0,
    }
    for fault, present in faults.items():
        if present:
            raise model_unsupported(f"{architecture} with {fault} is not supported")


def _sliding_windows(family: Family, config: Any) -> tuple[int | None, ...]:
    layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if family.windows is not WindowLayers.BY_TYPE:
        return (window if family.windows is WindowLayers.ALL else None,) * layers
    kinds = _layer_types(config)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise model_unsupported(f"layer_types {sorted(set(kinds))} of {len(kinds)} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_types(config: Any) -> list[str]:
    kinds: list[str] = getattr(config, "layer_types", None) or []
    return kinds or ["full_attention"] * config.num_hidden_layers


def _rotary(family: Family, config: Any) -> dict[str, Any]:
    """The fields of `DecoderConfig` that concern positions."""
    parameters = config.rope_parameters
    nested = all(isinstance(value, dict) for value in parameters.values()) and bool(parameters)
    kinds = _layer_types(config) if nested else ["full_attention"] * config.num_hidden_layers
    order = sorted(set(kinds))  # full attention first
    found = [_Rotary(family, config, kind if nested else None) for kind in order]
    rotated = family.layer_ropes(config) if family.layer_ropes else [True] * len(kinds)
    if len(rotated) != config.num_hidden_layers:
        raise model_unsupported(f"positions are stated for {len(rotated)} layers")
    layers = tuple(
        order.index(kind) if used else NO_ROPE for kind, used in zip(kinds, rotated, strict=True)
    )
    first = found[0].rope
    values: dict[str, Any] = {
        "rope_inv_freq": first.inv_freq,
        "rope_scale": first.scale,
        "max_positions": min(config.max_position_embeddings, *(each.most for each in found)),
    }
    if any(layers):
        values |= {"more_ropes": tuple(each.rope for each in found[1:]), "layer_ropes": layers}
    long = [each for each in found if each.long is not None]
    if long and len(found) > 1:
        raise model_unsupported("rope_type 'longrope' for some layers is not supported")
    if long and config.max_position_embeddings > long[0].short_positions:
        values |= {"long_rope": long[0].long, "short_positions": long[0].short_positions}
    return values


class _Rotary:
    """The rotary frequencies of one kind of layers, computed as transformers does.

    Attributes:
        rope: for sequences of any length, or for short ones.
        long: for sequences of more than `short_positions` tokens, if they have other frequencies.
        most: the longest sequence for which the frequencies hold.
    """

    def __init__(self, family: Family, config: Any, layer_type: str | None) -> None:
        """`layer_type` is None if all layers have the same parameters."""
        parameters = config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        self._config, self._parameters, self._layer_type = config, parameters, layer_type
        self.kind = parameters.get("rope_type", "default")
        if self.kind not in ("default", *SCALINGS):
            raise model_unsupported(
                f"rope_type {self.kind!r} is not supported; supported are default, "
                f"{', '.join(SCALINGS)}"
            )
        self._part = parameters.get("partial_rotary_factor") or 1.0
        if not family.partial_rotary:
            if self._part != 1 and self.kind != "default":
                raise model_unsupported(
                    f"rope_type {self.kind!r} with a partial_rotary_factor is not supported for a "
                    f"{family.model_type}"
                )
            self._part = 1.0  # transformers does not read it
        self.most: int = config.max_position_embeddings
        self.long: Rope | None = None
        self.short_positions = 0
        if self.kind == "default":
            self.rope = self._default()
            return
        self.rope = self._scaled(None)
        original = parameters.get("original_max_position_embeddings")
        if self.kind == "dynamic" and original:
            self.most = min(self.most, original)
        if self.kind == "longrope":
            self.short_positions = int(original)
            self.long = self._scaled(self.short_positions + 1)

    def _scaled(self, length: int | None) -> Rope:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        further = {} if self._layer_type is None else {"layer_type": self._layer_type}
        try:
            frequencies, scale = ROPE_INIT_FUNCTIONS[self.kind](
                self._config, "cpu", seq_len=length, **further
            )
        except Exception as error:  # missing values, and such as do not fit each other
            raise _unreadable(error) from error
        return Rope(tuple(frequencies.tolist()), float(scale))

    def _default(self) -> Rope:
        import torch

        config = self._config
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = int(head * self._part)
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return Rope(tuple((1.0 / self._parameters["rope_theta"] ** exponents).tolist()))
