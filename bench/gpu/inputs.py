"""Synthetic models and adapters, made on the device in seconds: random numbers, right layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.base.config import FUSED, PROJECTIONS, DecoderConfig
from loraplex_model.base.weights import BLOCK, BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.ops import nf4

LEVEL = 0.55
"""Root of the mean square of NF4's values, if all codes are equally frequent."""


def config(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    positions: int = 8192,
    window: int | None = None,
) -> DecoderConfig:
    """The settings of a Llama-like model."""
    frequencies = tuple(500_000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2))
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_inv_freq=frequencies,
        rope_scale=1.0,
        max_positions=positions,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        tie_embeddings=False,
        sliding_windows=(window,) * layers,
    )


LLAMA_8B = config(
    hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocab=128_256
)
"""The shapes of Llama-3.1-8B."""

TINY = config(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, head_dim=32, vocab=256)
"""The stand-in for `LLAMA_8B` in a dry run."""


def with_layers(model: DecoderConfig, layers: int) -> DecoderConfig:
    """The same model with fewer layers."""
    return replace(model, num_layers=layers, sliding_windows=model.sliding_windows[:layers])


def random_matrix(rows: Sequence[int], fan_in: int, device: str, std: float = 0.02) -> NF4Matrix:
    """A stack of modules with these output rows: random codes, maxima within a fifth of another."""
    codes, absmax, scales = [], [], []
    middle = std / LEVEL
    for out in rows:
        blocks = nf4.blocks_of(out, fan_in)
        shape = {"device": device, "dtype": torch.uint8}
        codes.append(torch.randint(0, 256, (out * fan_in // 2,), **shape))
        absmax.append(torch.randint(0, 256, (blocks,), **shape))
        groups = -(-blocks // nf4.NESTED_BLOCK)
        scales.append(middle * (0.1 + 0.1 * torch.rand(groups, device=device)))
    return NF4Matrix(
        (sum(rows), fan_in),
        torch.cat(codes),
        torch.cat(absmax),
        tuple(scales),
        (middle,) * len(rows),
        tuple(rows),
    )


def random_weights(model: DecoderConfig, dtype: torch.dtype, device: str) -> BaseWeights:
    """A base model with random codes, whose activations keep their size from layer to layer."""
    shapes = model.projection_shapes()

    def matrix(fused: str) -> NF4Matrix:
        modules = FUSED[fused]
        fan_in = shapes[modules[0]][0]
        std = min(0.02, fan_in**-0.5)
        return random_matrix([shapes[module][1] for module in modules], fan_in, device, std)

    def dense(*shape: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.float32) * std).to(dtype)

    ones = torch.ones(model.hidden_size, dtype=dtype, device=device)
    layers = tuple(
        LayerWeights(
            input_norm=ones,
            qkv=matrix("qkv"),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            o=matrix("o"),
            o_bias=None,
            post_norm=ones,
            gate_up=matrix("gate_up"),
            down=matrix("down"),
        )
        for _ in range(model.num_layers)
    )
    vocab, hidden = model.vocab_size, model.hidden_size
    embed = dense(vocab, hidden, std=1.0)
    head = embed if model.tie_embeddings else dense(vocab, hidden)
    return BaseWeights(model, embed, layers, ones, head, "sha256:synthetic", (0,))


def adapter_of(
    model: DecoderConfig, rank: int, dtype: torch.dtype, *, gains: bool = False
) -> PackedAdapter:
    """A LoRA adapter of all projections in host memory, its matrices filled with zeros.

    With `gains` each projection also has a random gain and a bias, as those of DoRA and BitFit.
    """
    sites = {}
    for layer in range(model.num_layers):
        for name in PROJECTIONS:
            fan_in, out = model.projection_shapes()[name]
            sites[layer, name] = ProjectionDelta(
                a=torch.zeros(1, dtype=dtype).expand(rank, fan_in),
                b=torch.zeros(1, dtype=dtype).expand(rank, out),
                gain=1 + 0.1 * torch.randn(out) if gains else None,
                bias=0.1 * torch.randn(out) if gains else None,
            )
    return pack(AdapterDelta(sites, None), dtype)


def random_factors(adapter: PackedAdapter, device: str, std: float) -> PackedAdapter:
    """A copy of an adapter on `device`, whose matrices A and B are random."""
    data = adapter.data.to(device).clone()
    for places in adapter.places.values():
        for name in ("a", "b"):
            place = places[name]
            size = prod(place.shape) * place.dtype.itemsize
            numbers = torch.randn(place.shape, device=device) * std
            data[place.start : place.start + size].view(place.dtype).copy_(
                numbers.to(place.dtype).view(-1)
            )
    return PackedAdapter(data, adapter.places, adapter.virtual_places, adapter.options)


def random_copy(adapter: PackedAdapter, device: str, std: float) -> PackedAdapter:
    """The same for an adapter of matrices in one type alone, in a single launch."""
    dtype = next(iter(adapter.places.values()))["a"].dtype
    count = adapter.nbytes // dtype.itemsize
    numbers = (torch.randn(count, device=device) * std).to(dtype)
    return PackedAdapter(
        numbers.view(torch.uint8), adapter.places, adapter.virtual_places, adapter.options
    )


def blocks_of_weights(model: DecoderConfig) -> float:
    """Bytes of a step's linear weights in NF4 with double quantisation."""
    weights = sum(fan_in * out for fan_in, out in model.projection_shapes().values())
    return model.num_layers * weights * (0.5 + 1 / BLOCK + 4 / (BLOCK * nf4.NESTED_BLOCK))
