"""The decoder on CUDA: one copy to the device, the launches of a pass, one copy back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from loraplex_model.decoder.cuda.choices import Timings
from loraplex_model.decoder.cuda.draws import DrawTable
from loraplex_model.decoder.cuda.graphs import Capture, CudaCapture, Graphs, GraphSizes
from loraplex_model.decoder.cuda.kernels import sampling
from loraplex_model.decoder.cuda.network import Network, device_matrices
from loraplex_model.decoder.cuda.plan import RANK_STEP, PlanCapacity
from loraplex_model.decoder.cuda.products import BUCKETS, Products
from loraplex_model.decoder.cuda.step.bounds import Bounds
from loraplex_model.decoder.cuda.step.own_rows import OwnRows
from loraplex_model.decoder.cuda.step.passes import DevicePass, PassPlan, PassShape, plan_pass
from loraplex_model.decoder.cuda.step.staging import Staging, Transfers
from loraplex_model.decoder.cuda.step.tickets import HostRoom, PassTicket
from loraplex_model.decoder.cuda.step.workspace import Workspace
from loraplex_model.decoder.cuda.table import DeviceTable
from loraplex_model.decoder.cuda.tiles import most_tall_tiles

_LOGGER = logging.getLogger(__name__)

BLOCK_SIZE = 32
"""Tokens of a KV block that serving uses; the kernels take any number."""

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
        states: float32 [H, hidden], on the device.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    lines: torch.Tensor
    states: torch.Tensor


class CudaDecoder:
    """Computes forward passes of one base model; owns its KV cache and its slot table.

    Everything is launched on the current stream, and passes follow one another on it. Not
    thread-safe, except for `merge`. Adapters may be published and removed between passes; one that
    is removed may not be used by a pass that is still under way.

    Activations have the compute dtype, sums are float32. The tensors may also be on the CPU, where
    the kernels run in Triton's interpreter: for tests.

    Attributes:
        table: the resident adapters.
        block_size: tokens of a KV block.
        keys, values: per layer [blocks, kv_heads, block_size, head_dim], compute dtype.
        kernels: what computes the passes, for people.
        transfers: counts the copies between host and device.
        last_tokens: int32 [draws], the tokens that the last pass with draws chose.
        graphs: the captured graphs; None without any.
    """

    def __init__(
        self,
        weights: BaseWeights,
        num_blocks: int | Callable[[int, Mapping[str, int]], int],
        block_size: int,
        num_slots: int,
        *,
        max_positions: int | None = None,
        max_rows: int = MOST_ROWS,
        max_draws: int = MOST_DRAWS,
        graphs: GraphSizes | None = None,
        capture: Capture | None = None,
        copy_bytes: int = 0,
        timings: Timings | None = None,
    ) -> None:
        """Packs the weights, measures the products, compiles the kernels and captures graphs.

        Args:
            num_blocks: KV blocks; see also `decoder.open.CacheSize`.
            max_positions: the longest sequence; by default the model's context.
            max_rows: rows of a pass for which memory is allocated at once.
            max_draws: tokens that one pass can choose on the device.
            graphs: the passes that graphs are captured for; None captures none.
            capture: what captures them; by default CUDA.
            copy_bytes, timings: see `Products`.
        """
        config, device, dtype = weights.config, weights.embed.device, weights.embed.dtype
        self.weights, self.block_size = weights, block_size
        self.kernels = _description(device)
        self.table = SlotTable(num_slots, config)
        self._device_table = DeviceTable(self.table, device)
        self.transfers = Transfers()
        positions = max_positions or config.max_positions
        matrices = device_matrices(weights)
        products = Products(
            [matrix for layer in matrices for matrix in layer.values()],
            dtype,
            most_rows=max_rows,
            copy_bytes=copy_bytes,
            timings=timings,
        )
        shapes = [] if graphs is None else list(graphs.shapes(positions, block_size))
        self._space = Workspace.of(config, dtype, device, max_rows, shapes)
        self._staging = Staging(device, 1 << 20, self.transfers)
        self.last_tokens = torch.full((max_draws,), -1, dtype=torch.int32, device=device)
        self._kept = sampling.workspace(max_draws, device)
        self._drawn = 0
        if not isinstance(num_blocks, int):
            num_blocks = num_blocks(block_size, self._taken_later(shapes, max_rows))
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._cache = torch.zeros((config.num_layers, 2, *shape), dtype=dtype, device=device)
        self.keys = [layer[0] for layer in self._cache]
        self.values = [layer[1] for layer in self._cache]
        self._network = Network(weights, self.keys, self.values, positions, products, matrices)
        self._bounds = Bounds(config.vocab_size, positions, block_size, num_blocks, num_slots)
        self.graphs: Graphs | None = None
        if device.type == "cuda":
            self.warm_up(max_rows, graphs.max_rank if graphs else RANK_STEP)
        if shapes:
            self.graphs = self._captured(shapes, capture or CudaCapture())

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, *, states: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a pass and fills the cache; returns logits, float32 [R, vocab], on the CPU.

        Writes the final states of `batch.state_rows` to `states`, float32 [H, hidden], on the CPU.
        Raises `PassOutOfBounds`.
        """
        under_way = self.start(batch)
        logits = under_way.logits
        result = torch.empty(logits.shape, pin_memory=logits.is_cuda)
        self.transfers.copy_out(result, logits)
        self.transfers.wait(self.transfers.mark(logits.device))
        if states is not None:
            states.copy_(under_way.states)
        return result

    def launch(self, batch: ForwardBatch, draws: DrawTable, lines: NDArray[np.int32]) -> PassTicket:
        """Launches a pass and the copies of its results: tokens and lines. See `start`."""
        config, device = self.weights.config, self.weights.embed.device
        shapes = (len(lines), config.vocab_size), (len(batch.state_rows), config.hidden_size)
        room = HostRoom.of(len(draws.records), *shapes, device)
        run = self.start(batch, draws, lines)
        return PassTicket.of(run.tokens, run.lines, run.states, room, self.transfers)

    @torch.no_grad()
    def start(
        self,
        batch: ForwardBatch,
        draws: DrawTable | None = None,
        lines: NDArray[np.int32] | None = None,
    ) -> Launched:
        """Launches a pass without waiting for it. Raises `PassOutOfBounds`.

        Args:
            batch: token -1 - k is the k-th that the last pass with draws chose.
            draws: tokens to choose from the logits.
            lines: int32 [L], rows of the logits that are wanted.
        """
        self._bounds.check(batch, self.table.prompt_counts, self._drawn)
        config = self.weights.config
        plan = plan_pass(
            batch,
            self.table,
            group=config.num_heads // config.num_kv_heads,
            block_size=self.block_size,
            vocab=config.vocab_size,
            long_from=self._network.places.long_from,
            draws=draws,
            lines=lines,
        )
        assert plan.shape.draws <= len(self.last_tokens)
        self._device_table.update()
        found = self.graphs.launch(plan) if self.graphs else None
        logits, kept = found or self._launch(plan)
        first = plan.shape.logits
        states = self._space.normed[first : first + plan.shape.states].float()
        if draws is not None:  # a pass without any, of virtual tokens say, leaves those before
            self._drawn = len(draws.records)
        return Launched(logits, self.last_tokens[: plan.shape.draws], kept, states)

    def merge(self, adapter: PackedAdapter, dtype: torch.dtype) -> Merged:
        """Merges an adapter: dense copies, in `dtype`, of the matrices that it changes.

        Only reads the base's weights, so it may run during a pass.
        """
        changes = adapter.to(self.weights.embed.device).unpack()
        with torch.no_grad():
            matrices = dict(merge_layers(self.weights, changes, dtype))
        addresses = np.zeros((self.weights.config.num_layers, len(FUSED)), np.uint64)
        return Merged(matrices, addresses, sum(matrix.nbytes for matrix in matrices.values()))

    @torch.no_grad()
    def write_prefix(self, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [layers, n, kv_heads, head_dim] to the start of `blocks`."""
        states = torch.stack([keys, values], dim=1).to(self._cache)  # [layers, 2, n, ...]
        states = states.transpose(2, 3)  # [layers, 2, kv_heads, n, head_dim]
        for block, part in zip(blocks, torch.split(states, self.block_size, 3), strict=False):
            self._cache[:, :, block, :, : part.shape[3]] = part

    @torch.no_grad()
    def warm_up(self, max_rows: int, max_rank: int) -> None:
        """Runs every kernel that passes without torch code use, on padding, so that all compile.

        Changes neither the cache nor the drawn tokens.
        """
        config = self.weights.config
        group = config.num_heads // config.num_kv_heads
        sizes = [*(rows for rows in BUCKETS if rows < max_rows), max_rows]
        for rows in sizes:
            few = min(rows, len(self.last_tokens))
            for lora in (None, PlanCapacity.of_rows(rows, max_rank)):
                shape = PassShape(
                    rows=rows,
                    logits=few,
                    short=rows,
                    tall=most_tall_tiles(rows, 1, group),
                    chunks=2,
                    lora=lora,
                    draws=few,
                    lines=1,
                    ragged=rows,
                )
                self._compute_eagerly(shape, shape.layout().nothing(), None)

    def _launch(self, plan: PassPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Launches a pass kernel by kernel; returns its logits and the lines for the host."""
        own = None
        if plan.needs_torch:
            own = OwnRows(
                self.table,
                plan.torch_segments,
                plan.torch_head_segments,
                self.weights.config,
                plan.has_virtual,
                plan.torch_state_segments,
            )
        return self._compute_eagerly(plan.shape, plan.arrays, own)

    def _compute_eagerly(
        self, shape: PassShape, arrays: Mapping[str, NDArray[Any]], own: OwnRows | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, device, layout = self.weights.config, self._cache.device, shape.layout()
        with torch.inference_mode(False):  # later passes may be outside of inference mode
            if layout.nbytes > self._staging.capacity:
                self._staging = Staging(device, 2 * layout.nbytes, self.transfers)
            self._space = self._space.with_room(config, shape)
        self._staging.send(layout, arrays)
        views = layout.views(self._staging.buffer)
        step = DevicePass.at(views, shape, self._device_table.entries, own)
        logits = torch.empty(shape.logits, config.vocab_size, device=device)
        lines = torch.empty(shape.lines, config.vocab_size, device=device)
        self._compute(step, self._space, logits, lines)
        return logits, lines

    def _compute(
        self, step: DevicePass, space: Workspace, logits: torch.Tensor, lines: torch.Tensor
    ) -> None:
        """Everything that a pass launches; also what a graph consists of."""
        if step.copies.numel():
            source, target = step.copies
            self._cache.index_copy_(2, target, self._cache.index_select(2, source))
        hidden = self._network.hidden_states(step, space, self.last_tokens)
        self._network.head(step, hidden, logits)
        sampling.copy_lines(logits, step.lines, step.line_count, lines)
        sampling.sample(logits, step.draws, self.last_tokens, self._kept)

    def _taken_later(self, shapes: Sequence[PassShape], max_rows: int) -> Mapping[str, int]:
        """Estimate of the device memory that is taken after the cache, by purpose.

        What is free can be measured after this call.
        """
        if self.weights.embed.is_cuda:
            torch.cuda.empty_cache()  # what measuring the products took and gave back
        vocab = self.weights.config.vocab_size
        later = {"logits": 4 * vocab * max_rows}
        if shapes:
            later["graphs"] = Graphs.bytes_for(shapes, vocab)
        return later

    @torch.no_grad()
    def _captured(self, shapes: Sequence[PassShape], capture: Capture) -> Graphs | None:
        """The graphs; None, with an error in the log, if the device captures none.

        Passes have the same results without graphs, so a server starts all the same.
        """
        try:
            return Graphs(
                shapes,
                self._space,
                self._compute,
                self._device_table.entries,
                self.weights.config.vocab_size,
                self.transfers,
                capture,
            )
        except RuntimeError as error:
            if self.weights.embed.is_cuda:
                torch.cuda.synchronize()  # raises if the device cannot be used any more
            _LOGGER.error("every pass is launched kernel by kernel, without graphs: %s", error)
            return None


def _description(device: torch.device) -> str:
    if device.type != "cuda":
        return "Triton, interpreted"
    major, minor = torch.cuda.get_device_capability(device)
    return f"Triton sm_{major}{minor}"
