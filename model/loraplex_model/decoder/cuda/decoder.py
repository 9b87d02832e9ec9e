"""The decoder on CUDA: one copy to the device, the launches of a pass, one copy back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.adapters.merge import merge_layers
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.adapters.table import Merged, SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import FUSED
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.cuda.draws import DrawTable
from loraplex_model.decoder.cuda.graphs import Capture, CudaCapture, Graphs, GraphSizes
from loraplex_model.decoder.cuda.kernels import sampling
from loraplex_model.decoder.cuda.network import Network, device_matrices
from loraplex_model.decoder.cuda.products import Products
from loraplex_model.decoder.cuda.step.bounds import Bounds
from loraplex_model.decoder.cuda.step.own_rows import OwnRows
from loraplex_model.decoder.cuda.step.passes import DevicePass, PassPlan, PassShape, plan_pass
from loraplex_model.decoder.cuda.step.staging import Staging, Transfers
from loraplex_model.decoder.cuda.step.tickets import PassTicket
from loraplex_model.decoder.cuda.step.workspace import Workspace
from loraplex_model.decoder.cuda.table import DeviceTable

MOST_ROWS = 512
"""Rows of a pass for which memory is allocated at once; larger passes allocate more."""

MOST_DRAWS = 256
"""Tokens that one pass can choose on the device, unless a decoder is made for more."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A pass under way; the tensors are overwritten by the next one.

    Attributes:
        logits: float32 [R, vocab], on the device. Rows from which a token was chosen are spoilt.
        tokens: int32 [D], the chosen tokens, on the device.
        lines: float32 [L, vocab], on the device.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    lines: torch.Tensor


class CudaDecoder:
    """Computes forward passes of one base model; owns its KV cache and its slot table.

    Everything is launched on the current stream, and passes follow one another on it. Not
    thread-safe, except for `merge`. Adapters may be published and removed between passes; one that
    is removed may not be used by a pass that is still under way.

    Activations have the compute dtype, sums are float32. The tensors may also be on the CPU, where
    the kernels run in Triton's interpreter: for tests.

    Attributes:
        table: the resident adapters.
        keys, values: per layer [blocks, kv_heads, block_size, head_dim], compute dtype.
        transfers: counts the copies between host and device.
        last_tokens: int32 [draws], the tokens that the last pass chose.
    """

    def __init__(
        self,
        weights: BaseWeights,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        *,
        max_positions: int | None = None,
        max_rows: int = MOST_ROWS,
        max_draws: int = MOST_DRAWS,
        graphs: GraphSizes | None = None,
        capture: Capture | None = None,
    ) -> None:
        """Packs the weights for the kernels, compiles the kernels and captures graphs.

        Args:
            max_positions: the longest sequence; by default the model's context.
            max_rows: rows of a pass for which memory is allocated at once.
            max_draws: tokens that one pass can choose on the device.
            graphs: the passes that graphs are captured for; None captures none.
            capture: what captures them; by default CUDA.
        """
        config, device, dtype = weights.config, weights.embed.device, weights.embed.dtype
        self.weights = weights
        self.table = SlotTable(num_slots, config)
        self._device_table = DeviceTable(self.table, device)
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._cache = torch.zeros((config.num_layers, 2, *shape), dtype=dtype, device=device)
        self.keys = [layer[0] for layer in self._cache]
        self.values = [layer[1] for layer in self._cache]
        positions = max_positions or config.max_positions
        self._bounds = Bounds(config.vocab_size, positions, block_size, num_blocks, num_slots)
        matrices = device_matrices(weights)
        self._products = Products(
            [matrix for layer in matrices for matrix in layer.values()], dtype, most_rows=max_rows
        )
        self._network = Network(
            weights, self.keys, self.values, positions, self._products, matrices
        )
        self.transfers = Transfers()
        self._staging = Staging(device, 1 << 16, self.transfers)
        self._space = self._workspace(max_rows, 0, 0)
        self.last_tokens = torch.full((max_draws,), -1, dtype=torch.int32, device=device)
        self._kept = sampling.workspace(max_draws, device)
        self._drawn = 0
        self._graphs = None if graphs is None else self._captured(graphs, capture)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Computes a pass and fills the cache; returns logits, float32 [R, vocab], on the CPU.

        Raises `PassOutOfBounds`.
        """
        logits = self.start(batch).logits
        result = torch.empty(logits.shape, pin_memory=logits.is_cuda)
        self.transfers.copy_out(result, logits)
        self.transfers.wait(self.transfers.mark(logits.device))
        return result

    @torch.no_grad()
    def start(
        self,
        batch: ForwardBatch,
        draws: DrawTable | None = None,
        lines: NDArray[np.int32] | None = None,
    ) -> Launched:
        """Launches a pass without waiting for it. Raises `PassOutOfBounds`.

        Args:
            batch: token -1 - k is the k-th that the pass before chose.
            draws: tokens to choose afterwards; their lists and records go to the device too.
            lines: int32 [L], rows of the logits that are wanted.
        """
        self._bounds.check(batch, self.table.prompt_counts, self._drawn)
        config = self.weights.config
        plan = plan_pass(
            batch,
            self.table,
            group=config.num_heads // config.num_kv_heads,
            block_size=self._bounds.block_size,
            vocab=config.vocab_size,
            draws=draws,
            lines=lines,
        )
        self._device_table.update()
        found = self._graphs.launch(plan) if self._graphs else None
        logits, kept = found or self._launch(plan)
        if draws is not None:  # a pass without any, of virtual tokens say, leaves those before
            self._drawn = len(draws.records)
        return Launched(logits, self.last_tokens[: plan.shape.draws], kept)

    def launch(self, batch: ForwardBatch, draws: DrawTable, lines: NDArray[np.int32]) -> PassTicket:
        """Launches a pass and the copies of its results: tokens and lines. See `start`."""
        under_way = self.start(batch, draws, lines)
        return PassTicket.of(under_way.tokens, under_way.lines, self.transfers)

    def _launch(self, plan: PassPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Launches a pass kernel by kernel; returns its logits and the lines for the host."""
        own = None
        if plan.needs_torch:
            own = OwnRows(
                self.table,
                plan.torch_segments,
                plan.torch_head_segments,
                self.weights.config.rms_norm_eps,
                plan.has_virtual,
            )
        shape = plan.shape
        step = self._staged(shape, plan.arrays, own)
        logits = self._logits(shape.logits)
        lines = torch.empty(shape.lines, logits.shape[1], device=logits.device)
        self._compute(step, self._room(shape), logits, lines)
        return logits, lines

    def _staged(
        self, shape: PassShape, arrays: Mapping[str, NDArray[Any]], own: OwnRows | None
    ) -> DevicePass:
        """Copies the arrays of a pass to the device."""
        layout = shape.layout()
        if layout.nbytes > self._staging.capacity:
            self._staging = Staging(self._cache.device, 2 * layout.nbytes, self.transfers)
        self._staging.send(layout, arrays)
        views = layout.views(self._staging.buffer)
        return DevicePass.at(views, shape, self._device_table.entries, own)

    def _compute(
        self, step: DevicePass, space: Workspace, logits: torch.Tensor, lines: torch.Tensor
    ) -> None:
        """Everything that a pass launches; also what a graph consists of."""
        self._copy_blocks(step.copies)
        hidden = self._network.hidden_states(step, space, self.last_tokens)
        self._network.head(step, hidden, logits)
        sampling.copy_lines(logits, step.lines, step.line_count, lines)
        sampling.sample(logits, step.draws, self.last_tokens, self._kept)

    def _captured(self, sizes: GraphSizes, capture: Capture | None) -> Graphs:
        shapes = list(sizes.shapes(self._bounds.positions, self._bounds.block_size))
        for shape in shapes:
            self._room(shape)
        return Graphs(
            shapes,
            self._space,
            self._compute,
            self._device_table.entries,
            self.weights.config.vocab_size,
            self.transfers,
            capture or CudaCapture(),
        )

    def merge(self, adapter: PackedAdapter, dtype: torch.dtype) -> Merged:
        """Merges an adapter: dense copies, in `dtype`, of the matrices that it changes.

        Only reads the base's weights, so it may run during a pass.
        """
        changes = adapter.to(self.weights.embed.device).unpack()
        with torch.no_grad():
            matrices = dict(merge_layers(self.weights, changes, dtype))
        addresses = np.zeros((self.weights.config.num_layers, len(FUSED)), np.uint64)
        return Merged(matrices, addresses, sum(matrix.nbytes for matrix in matrices.values()))

    def write_prefix(self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [layers, n, kv_heads, head_dim] to the start of `blocks`."""
        size = self._bounds.block_size
        states = torch.stack([keys, values], dim=1).to(self._cache)  # [layers, 2, n, ...]
        states = states.transpose(2, 3)  # [layers, 2, kv_heads, n, head_dim]
        for block, part in zip(blocks, states.split(size, dim=3), strict=False):
            self._cache[:, :, block, :, : part.shape[3]] = part

    def _logits(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.weights.config.vocab_size, device=self._cache.device)

    def _copy_blocks(self, copies: torch.Tensor) -> None:
        """Copies blocks of all layers at once: int64 [2, C], from and to."""
        if copies.numel():
            source, target = copies
            self._cache.index_copy_(2, target, self._cache.index_select(2, source))

    def _room(self, shape: PassShape) -> Workspace:
        """A workspace with room for a pass; a larger one if need be."""
        chunk_floats = self._network.chunk_floats(shape)
        low_rank_floats = self._network.low_rank_floats(shape)
        space = self._space
        if (
            shape.rows > space.rows
            or chunk_floats > space.chunks.numel()
            or low_rank_floats > space.low_rank.numel()
        ):
            self._space = self._workspace(
                max(shape.rows, space.rows),
                max(chunk_floats, space.chunks.numel()),
                max(low_rank_floats, space.low_rank.numel()),
            )
        return self._space

    def _workspace(self, rows: int, chunk_floats: int, low_rank_floats: int) -> Workspace:
        return Workspace.of(
            self.weights.config,
            self.weights.embed.dtype,
            self.weights.embed.device,
            rows=rows,
            chunk_floats=chunk_floats,
            low_rank_floats=low_rank_floats,
        )
