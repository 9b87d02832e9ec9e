"""Tokens before every prompt: prompt tuning, P-tuning and prefix tuning (P-tuning v2).

The initial values of a token's embedding, or of its keys and values, matter more than all other
options: random numbers lie far from everything that the base has seen. So the default is a text or
random tokens of the vocabulary; PEFT's random numbers have to be requested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from loraplex_adapters.format.kinds.virtual import ROOM
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward
from loraplex_model.decoder.attention import Attention, PackedAttention
from loraplex_model.ops.linear import DequantisedLinear
from pydantic import Field

from loraplex_training.methods import encoders
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.encoders import TokenEncoder
from loraplex_training.methods.options import MethodOptions, OptionProblems
from loraplex_training.methods.plain import PlainAdapter, config_of, leaf, precision
from loraplex_training.spec.fields import Positive, one_of

_SAVED = "prompt_embeddings"
"""Name of the only tensor in PEFT's files."""

_LSTM_LAYERS = 2
_STARTS = ("text", "vocabulary", "random", "zero")
_PEFT_STARTS = {"text": "TEXT", "vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


class VirtualOptions(MethodOptions):
    """Options of all methods with virtual tokens."""

    num_virtual_tokens: Annotated[Positive, Field(le=AdapterLimits().max_virtual_tokens)] = 16
    """Number of virtual tokens."""


class PromptTuningOptions(VirtualOptions):
    """Options of prompt tuning."""

    init: Annotated[str, one_of(_STARTS[:3])] | None = None
    """Initial values: text (the tokens of init_text, repeated or cut to the number), vocabulary
    (random tokens) or random (normal numbers). Default: text if init_text is given, else
    vocabulary."""
    init_text: str = ""
    """Text that the virtual tokens start from."""


class PTuningOptions(VirtualOptions):
    """Options of P-tuning."""

    encoder: Annotated[str, one_of(("mlp", "lstm"))] = "mlp"
    """Encoder that computes the virtual tokens: mlp or lstm."""
    encoder_hidden_size: Positive = 128
    """Hidden size of the encoder."""
    encoder_num_layers: Positive = _LSTM_LAYERS
    """Number of layers of the LSTM."""


class PrefixTuningOptions(VirtualOptions):
    """Options of prefix tuning."""

    init: Annotated[str, one_of(_STARTS)] | None = None
    """Initial values: text (those of init_text's tokens, repeated or cut to the number), vocabulary
    (those of random tokens), random (normal numbers) or zero. Default: text if init_text is given,
    else vocabulary; with prefix_projection random, or zero in the last layer."""
    init_text: str = ""
    """Text that the prefix starts from."""
    prefix_projection: bool = False
    """Compute the prefix with a trained MLP. Allows init random and zero only."""
    encoder_hidden_size: Positive = 512
    """Hidden size of the MLP."""


def prompt_tuning(
    options: PromptTuningOptions, setting: Setting, problems: OptionProblems
) -> TrainedAdapter:
    """Trained embeddings before the prompt (Lester et al. 2021, arXiv 2104.08691).

    Saved as PEFT's PROMPT_TUNING.
    """
    base, count = setting.base, _count(options, setting, problems)
    start, ids = _start(options, setting, problems, _STARTS[:3])
    problems.check()
    if ids is None:
        rows = torch.randn(count, base.config.hidden_size, generator=setting.generator)
    else:
        rows = base.embed[torch.tensor(ids, device=base.embed.device)]
    embeddings = leaf(rows, base)
    config = _config(setting, "PROMPT_TUNING", count)
    config["prompt_tuning_init"] = _PEFT_STARTS[start]
    if start == "text":  # PEFT's class requires both, and reads neither
        config |= {
            "prompt_tuning_init_text": options.init_text,
            "tokenizer_name_or_path": setting.base_model,
        }
    return PlainAdapter(
        {"embedding.weight": embeddings},
        lambda: AdapterDelta(virtual=VirtualTokens(embeddings=embeddings)),
        config,
        lambda: {_SAVED: embeddings},
    )


def p_tuning(options: PTuningOptions, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """Embeddings before the prompt that a trained encoder computes.

    Saved as PEFT's P_TUNING, with the encoder's output.
    """
    width, count = setting.base.config.hidden_size, _count(options, setting, problems)
    kind, hidden, layers = options.encoder, options.encoder_hidden_size, options.encoder_num_layers
    if kind == "mlp" and layers != _LSTM_LAYERS:
        text = "encoder_num_layers: the MLP has three layers; leave it out, or take lstm"
        problems.add("encoder_num_layers", text)
    problems.check()
    if kind == "lstm":
        encoder = encoders.lstm(count, width, hidden, layers, setting.generator)
    else:
        encoder = encoders.mlp(count, width, hidden, setting.generator)
    config = _config(
        setting,
        "P_TUNING",
        count,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=hidden,
        encoder_num_layers=layers,
        encoder_dropout=0.0,
    )
    return _encoded(encoder, setting, config, lambda rows: VirtualTokens(embeddings=rows))


def prefix_tuning(
    options: PrefixTuningOptions, setting: Setting, problems: OptionProblems
) -> TrainedAdapter:
    """Trained keys and values before the prompt, in every layer (Li and Liang 2021).

    Keys go into the cache unchanged, at positions 0 to n - 1. The keys of a text were rotated for
    these positions, so an untrained prefix equals its n tokens before the prompt: up to rounding,
    in every layer, with every kind of rotary position and every window. Saved as PEFT's
    PREFIX_TUNING.
    """
    base, config = setting.base, setting.base.config
    count = _count(options, setting, problems)
    projected, hidden = options.prefix_projection, options.encoder_hidden_size
    start, ids = _start(options, setting, problems, _STARTS[2:] if projected else _STARTS)
    if "encoder_hidden_size" in options.model_fields_set and not projected:
        text = "encoder_hidden_size: there is no encoder without prefix_projection"
        problems.add("encoder_hidden_size", text)
    problems.check()
    width = 2 * config.num_layers * config.kv_size
    saved = _config(setting, "PREFIX_TUNING", count, prefix_projection=projected)
    saved |= {"token_dim": config.kv_size, "num_attention_heads": config.num_kv_heads}
    if start == "zero":
        saved["init_weights"] = "zero"
    if projected:
        encoder = encoders.projection(count, config.kv_size, hidden, width, setting.generator)
        if start == "zero":
            for parameter in encoder.head[-1].parameters():
                torch.nn.init.zeros_(parameter)
        saved["encoder_hidden_size"] = hidden
        return _encoded(encoder, setting, saved, partial(_keys_and_values, config))
    if ids is not None:
        rows = cached_rows(base, ids)
    elif start == "zero":
        rows = torch.zeros(count, width)
    else:
        rows = torch.randn(count, width, generator=setting.generator)
    prefix = leaf(rows, base)
    return PlainAdapter(
        {"embedding.weight": prefix},
        lambda: AdapterDelta(virtual=_keys_and_values(config, prefix)),
        saved,
        lambda: {_SAVED: prefix},
    )


def cached_rows(base: BaseWeights, ids: Sequence[int]) -> torch.Tensor:
    """Returns the base's cache entries for a text at the beginning, in PEFT's layout of prefixes.

    [n, layers * 2 * kv_size]: for each token the key and value of layer 0, of layer 1, ...
    """
    device = base.embed.device
    tokens = torch.tensor(ids, device=device)
    recorded = _Recorded(PackedAttention(base.config, [0, len(ids)]))
    positions = torch.arange(len(ids), device=device)
    with torch.no_grad():
        forward.hidden_states(base, tokens, positions, [], DequantisedLinear(), recorded)
    return torch.cat(recorded.rows, dim=1)


class _Recorded:
    """Attention that records the keys and values of every layer, [n, 2 * kv_size] each."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self.rows: list[torch.Tensor] = []

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See `Attention`."""
        assert layer == len(self.rows), "layers come in their order"
        self.rows.append(torch.cat([k.flatten(1), v.flatten(1)], dim=1))
        return self._attention(layer, q, k, v)


def _keys_and_values(config: DecoderConfig, rows: torch.Tensor) -> VirtualTokens:
    """Converts rows in PEFT's layout, [n, layers * 2 * kv_size], to that of a cache."""
    shape = (len(rows), config.num_layers, 2, config.num_kv_heads, config.head_dim)
    keys, values = rows.view(shape).permute(2, 1, 0, 3, 4)
    return VirtualTokens(keys=keys, values=values)


def _count(options: VirtualOptions, setting: Setting, problems: OptionProblems) -> int:
    """The number of virtual tokens, which must leave room in the base's context."""
    most = setting.base.config.max_positions - ROOM
    return problems.at_most("num_virtual_tokens", options.num_virtual_tokens, most)


def _start(
    options: PromptTuningOptions | PrefixTuningOptions,
    setting: Setting,
    problems: OptionProblems,
    starts: Sequence[str],
) -> tuple[str, list[int] | None]:
    """Returns the chosen one of `starts`, and the ids of its tokens if it consists of any."""
    count, text = options.num_virtual_tokens, options.init_text
    default = ("text" if text else "vocabulary") if "text" in starts else starts[0]
    start = options.init or default
    if start not in starts:
        message = f"init is {start!r}; it should be {' or '.join(starts)} with prefix_projection"
        problems.add("init", message)
        return default, None
    if start == "vocabulary":
        drawn = torch.randint(
            len(setting.base.embed), (count,), generator=setting.generator, dtype=torch.long
        )
        ids: list[int] = drawn.tolist()
        return start, ids
    if start != "text":
        if text:
            problems.add("init_text", f"init_text: it is not used where init is {start!r}")
        return start, None
    ids = list(setting.token_ids(text))
    if not ids:
        message = 'init_text: write some text to start from, or take init = "vocabulary"'
        problems.add("init_text", message)
        return start, None
    return start, (ids * math.ceil(count / len(ids)))[:count]


def _config(setting: Setting, peft_type: str, count: int, **options: object) -> dict[str, object]:
    shape = setting.base.config
    return config_of(
        setting,
        peft_type,
        num_virtual_tokens=count,
        num_transformer_submodules=1,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        token_dim=shape.hidden_size,
        **options,
    )


def _encoded(
    encoder: TokenEncoder,
    setting: Setting,
    config: Mapping[str, object],
    virtual: Callable[[torch.Tensor], VirtualTokens],
) -> PlainAdapter:
    encoder.to(setting.base.embed.device, precision(setting.base))
    return PlainAdapter(
        dict(encoder.named_parameters()),
        lambda: AdapterDelta(virtual=virtual(encoder())),
        config,
        lambda: {_SAVED: encoder()},
    )
