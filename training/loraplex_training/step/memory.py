"""Estimates the memory of a pass and its steps beforehand, and measures it afterwards.

The estimate adds up what each function of the pass keeps per token for its derivative. Its
constants are for torch 2.13 on Linux; for the default model it is within a quarter of the measured
peak (`bench/bench_train.py` prints both).
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from loraplex_model.base.config import DecoderConfig, Gate
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward

from loraplex_training.step.loss import chunk_rows

_PROGRAM = 300 << 20
"""Bytes of Python, torch and the other libraries."""

_OPTIMISER_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2, "sgd": 0}
"""Bytes of state per parameter: two moments of 4 bytes or of 1 byte."""


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Size of one job's adapter.

    Attributes:
        parameters: number of trained parameters.
        itemsize: bytes of a parameter.
        optimiser: `OptimSpec.name`.
        ranks: for LoRA, the sum of the ranks of a layer's modules.
        head: whether the adapter changes the head.
    """

    parameters: int
    itemsize: int = 4
    optimiser: str = "adamw"
    ranks: int = 0
    head: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated bytes at the peak, by purpose."""

    items: Mapping[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.items.values())


def estimate(
    base: BaseWeights,
    tokens: int,
    adapters: Sequence[AdapterSize],
    checkpointing: bool = False,
    learned: int | None = None,
    products: torch.dtype | None = None,
) -> Estimate:
    """Estimates the memory of the largest pass.

    `tokens` counts the tokens of all its jobs, virtual ones included, and `learned` those of them
    that are learned (None: all). `products` is that of `JointPass`.
    """
    config, on_cuda = base.config, base.embed.is_cuda
    item = forward.activation_dtype(base.embed).itemsize
    learned = tokens if learned is None else learned
    ranks = max((adapter.ranks for adapter in adapters), default=0)
    narrow = item if products is None else products.itemsize
    layer = tokens * (_kept_by_norms(config) * item + _kept_by_products(config, ranks, narrow))
    if checkpointing:
        kept = config.num_layers * tokens * _kept_by_attention(config, ranks, item, narrow) + layer
    else:
        kept = config.num_layers * layer
    rows = min(learned, chunk_rows(config.vocab_size))
    copies = 3 if any(adapter.head for adapter in adapters) else 1  # autograd has its own
    loss = copies * rows * config.vocab_size * (max(item, 4) if products is None else narrow)
    loss += 4 * learned * config.hidden_size * item
    if not on_cuda and base.lm_head.element_size() < narrow:
        loss += base.lm_head.numel() * item
    return Estimate(
        {
            "program": 0 if on_cuda else _PROGRAM,
            "base": base.nbytes,
            "adapters": sum(_of_adapter(adapter) for adapter in adapters),
            "activations": kept,
            "loss": loss,
            "unpacked matrix": _largest_matrix(config) * narrow,
            # Freed blocks that do not fit later allocations. Measured.
            "allocator": kept // 5 + (0 if on_cuda else 10 * layer),
        }
    )


def peak_bytes() -> int:
    """Returns the peak memory of this process so far, on the device if that is a GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kept_by_norms(config: DecoderConfig) -> int:
    """Returns the number of values per token that a layer's norms keep until its backward pass."""
    # Their inputs; outputs are computed again.
    return 2 * (config.hidden_size + 1) * (1 + (config.output_norms and config.input_norms))


def _kept_by_products(config: DecoderConfig, ranks: int, item: int) -> int:
    """Returns the bytes per token that all else in a layer keeps, in values of `item` bytes."""
    mlp = (2 if config.gated else 1) * config.intermediate_size
    if config.num_experts:  # and the inputs and outputs of each expert
        mlp = config.experts_per_token * (2 * mlp + 2 * config.hidden_size) + config.num_experts
    elif config.gated and config.activation is not Gate.SILU:
        mlp *= 2  # the activated gate and its product with up, which our own SiLU computes again
    return (_kept_in_attention(config, item) + mlp + ranks) * item


def _kept_in_attention(config: DecoderConfig, item: int) -> int:
    """Returns the number of values of `item` bytes per token that attention keeps in a layer."""
    attention = config.q_size + 2 * config.kv_size  # q, k and v, rotated in place
    if config.qk_norm:  # q and k before their norms as well as rotated
        attention += config.q_size + config.kv_size + config.num_heads + config.num_kv_heads
    attended = 2 * config.q_size + config.num_heads  # twice: per head, and as input of o
    if item == 2:  # the kernels' result is both, and the number per head is float32
        attended = config.q_size + 2 * config.num_heads
    return attention + attended


def _kept_by_attention(config: DecoderConfig, ranks: int, item: int, narrow: int) -> int:
    """Returns the bytes per token of a layer whose MLP is computed again.

    These are the layer's input and what attention adds to it, from which the MLP is computed, and
    what attention keeps. `item` is the size of a value of the residual stream, `narrow` that of
    one that products read or give.
    """
    norms = _kept_by_norms(config) * item // 2  # of the block's two
    added = config.hidden_size * (item if config.output_norms else narrow)
    if config.parallel:
        added += config.hidden_size * narrow  # the norm's result, which the MLP reads too
    return norms + added + (_kept_in_attention(config, narrow) + ranks) * narrow


def _of_adapter(adapter: AdapterSize) -> int:
    # Parameters, their gradients, and the scaled copies that a pass reads with their gradients.
    return adapter.parameters * (3 * adapter.itemsize + _OPTIMISER_BYTES[adapter.optimiser])


def _largest_matrix(config: DecoderConfig) -> int:
    shapes = config.projection_shapes()
    qkv = sum(shapes[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    return config.hidden_size * max(qkv, 2 * config.intermediate_size)
