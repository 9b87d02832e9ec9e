"""Adapters, plans and float64 results for the tests of the LoRA kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from loraplex_model.adapters.table import Uses
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import ChunkPlan, PlanCapacity, plan_chunks
from loraplex_model.decoder.cuda.table import WORDS


@dataclass
class Part:
    """One adapter's change of one projection; absent parts are None."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass
class Adapters:
    """Adapters by slot and site, and the table of their addresses.

    `max_ranks`, `uses` and `dense` are what a plan reads of a `SlotTable`.
    """

    parts: list[list[Part]]
    entries: torch.Tensor = field(init=False)
    max_ranks: np.ndarray = field(init=False)
    uses: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.entries = torch.zeros(len(self.parts), len(self.parts[0]), WORDS, dtype=torch.int64)
        self.max_ranks = np.zeros(len(self.parts), np.int32)
        self.uses = np.full(len(self.parts), int(Uses.FACTORS), np.int32)
        for slot, sites in enumerate(self.parts):
            for site, part in enumerate(sites):
                words = self.entries[slot, site]
                for word, tensor in ((0, part.a), (1, part.b), (3, part.gain), (5, part.bias)):
                    words[word] = 0 if tensor is None else tensor.data_ptr()
                rank = 0 if part.b is None else len(part.b)
                words[8] = rank + (7 << 32)  # the upper half is another number
                self.max_ranks[slot] = max(self.max_ranks[slot], rank)

    def dense(self, mix: Mix) -> None:
        """No slot is merged."""


def aligned(values: torch.Tensor) -> torch.Tensor:
    """A copy that begins at a multiple of 64 bytes, as in packed adapters."""
    room = torch.empty(values.numel() + 64, dtype=values.dtype)
    start = -room.data_ptr() % 64 // values.element_size()
    own = room[start : start + values.numel()].view(values.shape)
    return own.copy_(values)


def factors(
    random: torch.Generator, rank: int, fan_in: int, width: int, dtype: torch.dtype
) -> Part:
    """Random A and B of a rank; rank 0 is no target."""
    if not rank:
        return Part()
    a = torch.randn(rank, fan_in, generator=random) / fan_in**0.5
    b = torch.randn(rank, width, generator=random) / rank**0.5
    return Part(aligned(a.to(dtype)), aligned(b.to(dtype)))


def plan_of(mixes: list[tuple[int, Mix]], adapters: Adapters) -> ChunkPlan:
    """The plan of sequences, each with a number of rows and a mix."""
    parts = [([1] * rows, 0, [0], mix) for rows, mix in mixes]
    return plan_chunks(ForwardBatch.build(parts), adapters)


def poisoned(entries: torch.Tensor, capacity: PlanCapacity) -> LoraPass:
    """Buffers of a capacity full of -1 and NaN, for `LoraPass.load`."""
    lora = LoraPass.empty(entries, capacity)
    for name, length in capacity.lengths().items():
        assert len(getattr(lora, name)) == length
        getattr(lora, name).fill_(float("nan") if name == "term_weight" else -1)
    return lora


def rows_of(mixes: list[tuple[int, Mix]]) -> list[Mix]:
    """The mix of each row."""
    return [mix for rows, mix in mixes for _ in range(rows)]


def expected(
    x: torch.Tensor,
    y: torch.Tensor,
    rows: list[Mix],
    adapters: Adapters,
    site: int,
    widths: list[int],
) -> torch.Tensor:
    """The formula of `adapters.delta` in float64, row by row."""
    result = y.double().clone()
    for row, mix in enumerate(rows):
        start = 0
        for part, width in enumerate(widths):
            own = result[row, start : start + width]
            changes = [(adapters.parts[slot][site + part], w) for slot, w in mix]
            gain = torch.ones(width, dtype=torch.float64)
            for change, weight in changes:
                if change.gain is not None:
                    gain += weight * (change.gain.double() - 1)
            own *= gain
            for change, weight in changes:
                if change.a is not None and change.b is not None:
                    inner = change.a.double() @ x[row].double()
                    own += weight * (inner @ change.b.double())
                if change.bias is not None:
                    own += weight * change.bias.double()
            start += width
    return result
