"""How much memory a pass and its steps take: reckoned before, measured after.

The count follows the code: what each function of the pass keeps for its derivative, a token. The
constants are of torch 2.13 on Linux; the whole comes within a quarter of what the default model
takes (`bench/train.py` prints both).
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder import forward

from loraplex_training.step.loss import chunk_rows

_PROGRAM = 300 << 20
"""Python, torch and the other libraries in memory."""

_OPTIMISER_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2, "sgd": 0}
"""State of one parameter: two moments of 4 bytes, or of 1."""


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """One job's adapter: numbers that it trains, bytes of each, its optimiser (`OptimSpec.name`)
    and, for LoRA, the sum of the ranks of a layer's modules and whether it has the head too."""

    parameters: int
    itemsize: int = 4
    optimiser: str = "adamw"
    ranks: int = 0
    head: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes at the peak, by what they are for."""

    items: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.items.values())


def estimate(
    base: BaseWeights,
    tokens: int,
    adapters: Sequence[AdapterSize],
    checkpointing: bool = False,
    learned: int | None = None,
) -> Estimate:
    """What the largest pass takes: of `tokens` tokens in all its jobs, virtual ones included, of
    which `learned` count (None: all)."""
    config, on_cuda = base.config, base.embed.is_cuda
    item = forward.activation_dtype(base.embed).itemsize
    learned = tokens if learned is None else learned
    ranks = max((adapter.ranks for adapter in adapters), default=0)
    layer = tokens * _kept_of_a_layer(config, ranks) * item
    if checkpointing:
        kept = config.num_layers * tokens * config.hidden_size * item + layer
    else:
        kept = config.num_layers * layer
    rows = min(learned, chunk_rows(config.vocab_size))
    copies = 3 if any(adapter.head for adapter in adapters) else 1  # autograd has its own
    loss = copies * rows * config.vocab_size * max(item, 4)
    loss += 4 * learned * config.hidden_size * item
    if not on_cuda and base.lm_head.element_size() < item:
        loss += base.lm_head.numel() * item
    return Estimate(
        {
            "program": 0 if on_cuda else _PROGRAM,
            "base": base.nbytes,
            "adapters": sum(_of_adapter(adapter) for adapter in adapters),
            "activations": kept,
            "loss": loss,
            "unpacked matrix": _largest_matrix(config) * item,
            # Blocks that were given back and do not fit what is asked for next; measured.
            "allocator": kept // 5 + (0 if on_cuda else 10 * layer),
        }
    )


def peak_bytes() -> int:
    """The most memory that this process has held so far, on the device if it is a GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kept_of_a_layer(config: DecoderConfig, ranks: int) -> int:
    """Numbers that a layer keeps of a token until its derivative is taken."""
    norms = 2 * (config.hidden_size + 1)  # their inputs; what comes out is made again
    attention = config.q_size + 2 * config.kv_size  # q, k and v, rotated in place
    if config.qk_norm:  # as they are before their norms, and rotated
        attention += config.q_size + config.kv_size + config.num_heads + config.num_kv_heads
    attended = 2 * config.q_size + config.num_heads  # twice: by heads, and as o reads it
    return norms + attention + attended + 2 * config.intermediate_size + ranks


def _of_adapter(adapter: AdapterSize) -> int:
    # Parameters, their gradients, the scaled copies that a pass reads and the gradients of those.
    return adapter.parameters * (3 * adapter.itemsize + _OPTIMISER_BYTES[adapter.optimiser])


def _largest_matrix(config: DecoderConfig) -> int:
    shapes = config.projection_shapes()
    qkv = sum(shapes[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    return config.hidden_size * max(qkv, 2 * config.intermediate_size)
