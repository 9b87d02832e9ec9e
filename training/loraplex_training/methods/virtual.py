"""Tokens before every prompt: prompt tuning, P-tuning and prefix tuning (P-tuning v2).

What a token's embedding, or its keys and values, start from matters more than anything else about
them: random numbers lie far from whatever the base has seen. So the start is a text, or random
words of the vocabulary, unless PEFT's random numbers are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward
from loraplex_model.decoder.attention import Attention, PackedAttention
from loraplex_model.ops.linear import DequantisedLinear

from loraplex_training.methods import encoders
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.encoders import TokenEncoder
from loraplex_training.methods.options import Options
from loraplex_training.methods.plain import PlainAdapter, config_of, leaf, precision

_SAVED = "prompt_embeddings"
"""PEFT's name of the one tensor."""

_LSTM_LAYERS = 2
_PEFT_STARTS = {"text": "TEXT", "vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


def prompt_tuning(options: Options, setting: Setting) -> TrainedAdapter:
    """Trained embeddings (Lester et al. 2021, arXiv 2104.08691), PEFT's PROMPT_TUNING.

    Options: `num_virtual_tokens`; `init`: "text" (the tokens of `init_text`, from the beginning
    again where they are too few, cut where they are too many), "vocabulary" (random tokens) or
    "random" (normal numbers).
    """
    base = setting.base
    count = _count(options)
    start, text, ids = _start(options, setting, count, ("text", "vocabulary", "random"))
    options.done()
    if ids is None:
        rows = torch.randn(count, base.config.hidden_size, generator=setting.generator)
    else:
        rows = base.embed[torch.tensor(ids, device=base.embed.device)]
    embeddings = leaf(rows, base)
    config = _config(setting, "PROMPT_TUNING", count)
    config["prompt_tuning_init"] = _PEFT_STARTS[start]
    if start == "text":  # PEFT's class wants both, and reads neither
        config |= {"prompt_tuning_init_text": text, "tokenizer_name_or_path": setting.base_model}
    return PlainAdapter(
        {"embedding.weight": embeddings},
        lambda: AdapterDelta(virtual=VirtualTokens(embeddings=embeddings)),
        config,
        lambda: {_SAVED: embeddings},
    )


def p_tuning(options: Options, setting: Setting) -> TrainedAdapter:
    """Embeddings from a trained encoder, PEFT's P_TUNING; the file holds what it puts out.

    Options: `num_virtual_tokens`; `encoder`: "mlp" or "lstm"; `encoder_hidden_size`;
    `encoder_num_layers`, of the LSTM.
    """
    width = setting.base.config.hidden_size
    count = _count(options)
    kind = options.choice("encoder", "mlp", ("mlp", "lstm"))
    hidden = options.integer("encoder_hidden_size", 128, 1)
    layers = options.integer("encoder_num_layers", _LSTM_LAYERS, 1)
    if kind == "mlp" and layers != _LSTM_LAYERS:
        options.refuse("encoder_num_layers: the MLP has three layers; leave it out, or take lstm")
    options.done()
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


def prefix_tuning(options: Options, setting: Setting) -> TrainedAdapter:
    """Trained keys and values of every layer, PEFT's PREFIX_TUNING.

    Options: `num_virtual_tokens`; `init`: "text" or "vocabulary" as for prompt tuning, "random"
    (normal numbers) or "zero"; `prefix_projection`: they come from an MLP of `encoder_hidden_size`,
    whose start is "random" or (its last layer) "zero".

    Keys stand in the cache as they are, not rotated again, at positions 0 to n - 1. Those of a text
    were rotated for just these, so the start equals having its n tokens before the prompt: up to
    rounding, in every layer, with any kind of rotary position and any window.
    """
    base, config = setting.base, setting.base.config
    count = _count(options)
    projected = options.flag("prefix_projection", False)
    hidden = options.integer("encoder_hidden_size", 512, 1)
    starts = ("random", "zero") if projected else ("text", "vocabulary", "random", "zero")
    start, _, ids = _start(options, setting, count, starts)
    if options.given("encoder_hidden_size") and not projected:
        options.refuse("encoder_hidden_size: there is no encoder without prefix_projection")
    options.done()
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
    """What the base puts into its cache for a text at its beginning, as PEFT lays prefixes out.

    [n, layers * 2 * kv_size]: for each token key and value of layer 0, of layer 1, ...
    """
    device = base.embed.device
    tokens = torch.tensor(ids, device=device)
    recorded = _Recorded(PackedAttention(base.config, [0, len(ids)]))
    positions = torch.arange(len(ids), device=device)
    with torch.no_grad():
        forward.hidden_states(base, tokens, positions, [], DequantisedLinear(), recorded)
    return torch.cat(recorded.rows, dim=1)


class _Recorded:
    """Attention that keeps the keys and values of every layer, [n, 2 * kv_size] each."""

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
    """Rows as PEFT lays them out, [n, layers * 2 * kv_size], as a cache has them."""
    shape = (len(rows), config.num_layers, 2, config.num_kv_heads, config.head_dim)
    keys, values = rows.view(shape).permute(2, 1, 0, 3, 4)
    return VirtualTokens(keys=keys, values=values)


def _count(options: Options) -> int:
    return options.integer("num_virtual_tokens", 16, 1, AdapterLimits().max_virtual_tokens)


def _start(
    options: Options, setting: Setting, count: int, starts: tuple[str, ...]
) -> tuple[str, str, list[int] | None]:
    """The start that was chosen, its text, and the `count` tokens that it is made of, if any."""
    text = options.text("init_text", "")
    default = ("text" if text else "vocabulary") if "text" in starts else starts[0]
    start = options.choice("init", default, starts)
    if start == "vocabulary":
        drawn = torch.randint(
            len(setting.base.embed), (count,), generator=setting.generator, dtype=torch.long
        )
        ids: list[int] = drawn.tolist()
        return start, text, ids
    if start != "text":
        if text:
            options.refuse(f"init_text: nothing is made of it where init is {start!r}")
        return start, text, None
    ids = list(setting.token_ids(text))
    if not ids:
        options.refuse('init_text: write some text to start from, or take init = "vocabulary"')
        return start, text, None
    return start, text, (ids * math.ceil(count / len(ids)))[:count]


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
