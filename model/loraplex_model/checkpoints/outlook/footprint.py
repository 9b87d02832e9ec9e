"""The sizes of a base model from its configuration alone: weights, KV cache, bytes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.quantisation import BLOCK, NESTED_BLOCK, blocks_of

_CONVERSION = 1_000_000_000  # bytes, with the tensor that is converted and the model in NF4


@dataclass(frozen=True, slots=True)
class Footprint:
    """Numbers of weights, and bytes that follow from them.

    Attributes:
        quantised: number of weights in NF4.
        nf4: bytes of their codes and maxima, as they are stored.
        embed, head: numbers in the embeddings, and in a head of its own (0 if it is tied).
        others: numbers in norms, biases and routers.
        expert: weights in NF4 of one expert, in all layers together; 0 without experts.
        kv: numbers of one token's keys and values in all layers.
    """

    config: DecoderConfig
    quantised: int
    nf4: int
    embed: int
    head: int
    others: int
    expert: int
    kv: int

    @staticmethod
    def of(config: DecoderConfig) -> Footprint:
        """Computes the sizes of a decoder."""
        shapes = list(_matrices(config))
        layers = config.num_layers
        embed = config.vocab_size * config.hidden_size
        expert = 0
        if config.num_experts:
            expert = sum(rows * width for rows, width, copies in shapes if copies > 1)
        return Footprint(
            config,
            quantised=layers * sum(rows * width * copies for rows, width, copies in shapes),
            nf4=layers * sum(copies * _nf4(rows, width) for rows, width, copies in shapes),
            embed=embed,
            head=0 if config.tie_embeddings else embed,
            others=layers * sum(_vectors(config)) + config.hidden_size * (1 + config.norm_bias),
            expert=layers * expert,
            kv=2 * layers * config.kv_size,
        )

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        return self.quantised + self.embed + self.head + self.others

    def in_memory(self, item_size: int, *, packed: bool) -> int:
        """Bytes of the weights in the memory of an engine.

        Args:
            item_size: that of the compute type.
            packed: in the layout of the C++ kernels, which read copies of their own: codes with
                maxima in float32, and the head.
        """
        dense = item_size * (self.embed + self.head + self.others)
        if not packed:
            return self.nf4 + dense
        return self._panels() + dense + item_size * self.embed

    def _panels(self) -> int:
        """Bytes of the matrices of all layers as the C++ decoder keeps them."""
        total = 0
        for rows, fan_in, copies in _matrices(self.config):
            count = rows * fan_in * copies
            # rows that do not consist of whole blocks are kept in float32
            total += 4 * count if fan_in % BLOCK else count // 2 + 4 * count // BLOCK
        return self.config.num_layers * total

    def read_in_step(self, rows: int, tokens: int, item_size: int) -> int:
        """Least bytes that a decode step of `rows` sequences of `tokens` tokens each reads."""
        config = self.config
        used = min(config.num_experts, rows * config.experts_per_token)
        left = self.quantised - self.expert * (config.num_experts - used)
        codes = left // 2 + left // BLOCK
        return codes + item_size * (self.embed + self.others + rows * self._seen(tokens))

    def _seen(self, tokens: int) -> int:
        """Numbers of the keys and values that a token after `tokens` others attends to."""
        windows = self.config.sliding_windows
        return 2 * self.config.kv_size * sum(min(tokens, window or tokens) for window in windows)

    def multiplications(self, rows: int) -> int:
        """Products of two numbers in a decode step, those of attention left out."""
        config = self.config
        used = self.quantised - self.expert * (config.num_experts - config.experts_per_token)
        return rows * (used + self.embed)


def conversion_peak(nf4: int, largest: int) -> int:
    """The bound on the memory of a conversion, in bytes.

    Args:
        nf4: size of the stored model.
        largest: size of the checkpoint's largest tensor.
    """
    return nf4 + largest + _CONVERSION


def _matrices(config: DecoderConfig) -> Iterator[tuple[int, int, int]]:
    """Rows, inputs and number of copies of each module of a layer."""
    shapes = config.module_shapes()
    for fused in config.fused:
        for module in config.modules_of(fused):
            fan_in, rows = shapes[module]
            yield rows, fan_in, config.copies_of(fused)


def _nf4(rows: int, fan_in: int) -> int:
    blocks = blocks_of(rows, fan_in)
    return -(-rows * fan_in // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK)


def _vectors(config: DecoderConfig) -> Iterator[int]:
    """Lengths of the norms, biases and routers of a layer."""
    shapes = config.module_shapes()
    for site, width in config.norm_widths().items():
        yield width * (1 + (config.norm_bias and site not in ("q_norm", "k_norm")))
    for module in config.biased & shapes.keys():
        yield shapes[module][1]
    yield config.num_experts * config.hidden_size
