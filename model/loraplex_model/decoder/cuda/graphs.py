"""CUDA graphs of decode passes: their launches are recorded once and then repeated as a whole.

There is a graph for each number of rows in `GraphSizes.rows`, with and without adapters, and for
short and long contexts. A pass uses the smallest graph that has room for it, and its other rows are
padding. A graph depends on shapes and addresses alone, so it is captured once, when the server
starts, and never again: tokens, block tables, contexts, adapters and draws are read from buffers of
fixed address. Passes that fit no graph are launched kernel by kernel, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loraplex_model.decoder.cuda.plan import PlanCapacity
from loraplex_model.decoder.cuda.step.passes import DevicePass, PassPlan, PassShape
from loraplex_model.decoder.cuda.step.staging import Staging, Transfers
from loraplex_model.decoder.cuda.step.workspace import Workspace
from loraplex_model.decoder.cuda.tiles import most_chunks

Replay = Callable[[], object]
"""Launches again what was captured."""

Capture = Callable[[Callable[[], None]], Replay]
"""Captures what a function launches, which it calls at least once."""

Compute = Callable[[DevicePass, Workspace, torch.Tensor, torch.Tensor], None]
"""Launches a pass, which writes its logits and the lines for the host to the two tensors."""

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that graphs are captured for."""

_GRAPH_BYTES = 4 << 20  # of a graph's nodes in device memory: a guess, not measured
_FEW_CHUNKS = 4
_LISTS = 1 << 16  # numbers in the lists of penalties of a pass


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """The passes that graphs are captured for.

    Attributes:
        max_rank: the largest rank of an adapter; rows of others are launched kernel by kernel.
        rows: numbers of rows.
        adapters_per_row: adapters of a row, on average over the rows of a pass.
        lines: lines of logits that the host wants.
    """

    max_rank: int
    rows: tuple[int, ...] = ROWS
    adapters_per_row: int = 2
    lines: int = 4

    @staticmethod
    def up_to(most_rows: int, max_rank: int) -> GraphSizes:
        """Sizes for passes of up to `most_rows` rows, or as many as graphs are captured for."""
        smaller = tuple(rows for rows in ROWS if rows < most_rows)
        return GraphSizes(max_rank, (*smaller, min(most_rows, ROWS[-1])))

    def shapes(self, positions: int, block_size: int) -> Iterator[PassShape]:
        """The shapes of the graphs, for sequences of up to `positions` tokens; largest first."""
        blocks = -(-positions // block_size)
        most = most_chunks(positions)
        for rows in sorted(self.rows, reverse=True):
            for chunks in sorted({most, min(most, _FEW_CHUNKS)}, reverse=True):
                capacity = PlanCapacity.of_rows(rows, self.max_rank, self.adapters_per_row)
                for lora in (capacity, None):
                    yield PassShape(
                        rows=rows,
                        logits=rows,
                        short=rows,
                        tall=0,
                        chunks=chunks,
                        lora=lora,
                        draws=rows,
                        lines=min(rows, self.lines),
                        ragged=rows * blocks + _LISTS,
                    )


class Graphs:
    """The captured graphs, and the buffers of fixed address that they read and write.

    Attributes:
        nbytes: device memory of the buffers and, as far as the allocator knows, of the captures.
    """

    @staticmethod
    def bytes_for(shapes: Sequence[PassShape], vocab: int) -> int:
        """Estimate of `nbytes` before the capture."""
        lines = max(s.logits for s in shapes) + max(s.lines for s in shapes)
        staged = max(shape.layout().nbytes for shape in shapes)
        return 4 * vocab * lines + staged + _GRAPH_BYTES * len(shapes)

    def __init__(
        self,
        shapes: Sequence[PassShape],
        space: Workspace,
        compute: Compute,
        entries: torch.Tensor,
        vocab: int,
        transfers: Transfers,
        capture: Capture,
    ) -> None:
        """Captures a graph for each shape, in the order given.

        Args:
            space: room for every shape; graphs keep it.
            compute: launches a pass.
            entries: the adapters' table of addresses.
        """
        before = _reserved()
        device = entries.device
        self._layouts = {shape: shape.layout() for shape in shapes}
        capacity = max(layout.nbytes for layout in self._layouts.values())
        self._staging = Staging(device, capacity, transfers)
        self._logits = torch.empty(max(s.logits for s in shapes), vocab, device=device)
        self._lines = torch.empty(max(s.lines for s in shapes), vocab, device=device)
        self._space, self._compute, self._entries = space, compute, entries
        self._replays = {shape: capture(self._body(shape)) for shape in shapes}
        self._ascending = sorted(shapes, key=lambda s: (s.rows, s.lora is not None, s.chunks))
        self.nbytes = _reserved() - before

    def launch(self, plan: PassPlan) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Launches the smallest graph that has room for a pass; None if there is none.

        Returns logits, float32 [R, vocab], and the lines for the host, float32 [L, vocab].
        """
        shape = self.shape_for(plan)
        if shape is None:
            return None
        self._staging.send(self._layouts[shape], plan.arrays)
        self._replays[shape]()
        return self._logits[: plan.shape.logits], self._lines[: plan.shape.lines]

    def shape_for(self, plan: PassPlan) -> PassShape | None:
        """The smallest shape that has room for a pass; None if there is none."""
        has_lora = plan.shape.lora is not None
        for shape in self._ascending:
            if (shape.lora is not None) == has_lora and plan.fits(shape):
                return shape
        return None

    def _body(self, shape: PassShape) -> Callable[[], None]:
        """A function that launches a pass of the shape; the staged one has only padding."""
        layout = self._layouts[shape]
        self._staging.send(layout, layout.nothing())
        step = DevicePass.at(layout.views(self._staging.buffer), shape, self._entries)
        logits, lines = self._logits[: shape.logits], self._lines[: shape.lines]
        return partial(self._compute, step, self._space, logits, lines)


class CudaCapture:
    """Captures graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Replay:
        """See `Capture`. The first call compiles what is not compiled, outside of the capture."""
        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        return graph.replay


def _reserved() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
