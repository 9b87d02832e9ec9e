"""Products of activations with the base model's matrices on a device, by the fastest means.

Candidates are the configurations of our own kernel, bitsandbytes' 4-bit product, and a product with
a dense copy. The last two read copies of the weights, so they need memory that is given for copies.
The fastest candidate depends on the card, so each is timed once for every shape and number of rows,
and the times are kept in a file. The candidates round and add differently: the
choice, and with it the card, decides the last bits of a result. For one choice they are fixed.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from loraplex_model.decoder.cuda.choices import Group, Shape, Times, Timings, best, place_copies
from loraplex_model.decoder.cuda.fourbit import FourBit
from loraplex_model.decoder.cuda.kernels import nf4
from loraplex_model.decoder.cuda.kernels.common import INTERPRETED
from loraplex_model.decoder.cuda.pack import DeviceMatrix
from loraplex_model.decoder.cuda.support import obstacle_to_bitsandbytes
from loraplex_model.decoder.cuda.tilings import Scratch, tilings
from loraplex_model.ops.linear import by_tiles

_LOGGER = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that are measured, besides the largest one that can occur."""

DENSE = "dense"
FOUR_BIT = "bitsandbytes"

_TOLERANCE = 0.02
"""Relative error above which a candidate is excluded; bfloat16 rounding alone is below 0.004."""

Run = Callable[[DeviceMatrix, torch.Tensor, torch.Tensor], None]


class Measure(Protocol):
    """Measures the microseconds of one call of `run`; any error excludes the candidate."""

    def __call__(
        self, candidate: str, shape: Shape, rows: int, run: Callable[[], None]
    ) -> float: ...


@dataclass(frozen=True, slots=True)
class ProductChoice:
    """What was chosen for the products of one shape and number of rows, as a report shows it.

    Attributes:
        rows: the choice holds for more rows than the row before, and up to this number.
        chosen: for each candidate the number of matrices that use it.
        times: microseconds of each candidate; empty if nothing was measured.
    """

    shape: Shape
    rows: int
    chosen: Mapping[str, int]
    times: Times


class Products:
    """Computes `x @ W.T + bias` for the matrices that it was made with.

    The launches of one instance share scratch memory, so they belong on one stream.
    """

    def __init__(
        self,
        matrices: Sequence[DeviceMatrix],
        dtype: torch.dtype,
        *,
        most_rows: int,
        copy_bytes: int = 0,
        timings: Timings | None = None,
        measure: Measure | None = None,
    ) -> None:
        """Measures and chooses. Nothing is measured off CUDA, unless `measure` is given.

        Args:
            matrices: all matrices, in the order in which they get copies.
            dtype: compute dtype, of activations and results.
            most_rows: the largest number of rows of one launch; more are computed in parts.
            copy_bytes: device memory for dense copies and for those of bitsandbytes, together.
                With 0 neither is made, and our kernel computes all products.
            timings: times measured before; what is missing is added, and saved.
            measure: replaces `device_time`.
        """
        self._dtype = dtype
        packed = [matrix for matrix in matrices if matrix.dense is None]
        self._device = matrices[0].starts.device
        self._rows = [*(rows for rows in BUCKETS if rows < most_rows), most_rows]
        on_card = self._device.type == "cuda" and not INTERPRETED
        if measure is None and on_card:
            measure = device_time
        processors, major = 1, 0
        if on_card:
            properties = torch.cuda.get_device_properties(self._device)
            processors, major = properties.multi_processor_count, properties.major
        by_shape: dict[Shape, list[DeviceMatrix]] = {}
        for matrix in packed:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._tilings = {
            (shape, rows): {t.name: t for t in tilings(shape, rows, dtype, processors, major)}
            for shape in by_shape
            for rows in self._rows
        }
        launches = [(t, *key) for key, named in self._tilings.items() for t in named.values()]
        self._scratch = Scratch.for_launches(launches, self._device)
        self._dense: dict[DeviceMatrix, torch.Tensor] = {}
        self._fourbit = FourBit()
        self._has_fourbit = on_card and not obstacle_to_bitsandbytes(torch.version.cuda)
        self._groups: list[Group] = []
        self._chosen: dict[DeviceMatrix, list[Run]] = {}
        self._names: dict[DeviceMatrix, list[str]] = {}
        for matrix in matrices:
            if matrix.dense is not None:
                self._dense[matrix] = matrix.dense
                self._assign(matrix, [DENSE] * len(self._rows))
        self._choose(by_shape, timings or Timings(None, ""), copy_bytes, measure)

    def _choose(
        self,
        by_shape: Mapping[Shape, Sequence[DeviceMatrix]],
        timings: Timings,
        copy_bytes: int,
        measure: Measure | None,
    ) -> None:
        """Measures what is not known yet, decides, and keeps only the scratch memory in use."""
        for shape, same in by_shape.items():
            times = {rows: self._times(same, rows, timings, measure) for rows in self._rows}
            self._groups.append(Group(shape, len(same), times, self._sizes(shape)))
        timings.save()
        place_copies(self._groups, copy_bytes if measure is not None else 0)
        for group, same in zip(self._groups, by_shape.values(), strict=True):
            self._settle(group, same)
        names = {(m.shape, n) for m, chosen in self._names.items() for n in enumerate(chosen)}
        used = [
            (self._tilings[shape, self._rows[bucket]][name], shape, self._rows[bucket])
            for shape, (bucket, name) in names
            if name not in (DENSE, FOUR_BIT)
        ]
        self._scratch = Scratch.for_launches(used, self._device)

    def multiply(self, matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `x @ W.T + bias` to `out`: x [T, in] -> out [T, out], both of the compute dtype.

        Rows of x and out are contiguous. Can be captured in a CUDA graph.
        """
        most = self._rows[-1]
        for start in range(0, len(x), most):
            part = x[start : start + most]
            bucket = next(n for n, rows in enumerate(self._rows) if len(part) <= rows)
            self._chosen[matrix][bucket](matrix, part, out[start : start + most])

    def report(self) -> list[ProductChoice]:
        """What was chosen, shape after shape."""
        rows: list[ProductChoice] = []
        for group in self._groups:
            same = [matrix for matrix in self._chosen if matrix.shape == group.shape]
            for bucket, count in enumerate(self._rows):
                chosen: dict[str, int] = {}
                for matrix in same:
                    name = self._names[matrix][bucket]
                    chosen[name] = chosen.get(name, 0) + 1
                measured = {n: t for n, t in group.times[count].items() if t > 0}
                rows.append(ProductChoice(group.shape, count, chosen, measured))
        return rows

    def _sizes(self, shape: Shape) -> dict[str, int]:
        """Bytes of each kind of copy of a matrix."""
        weights = shape[0] * shape[1]
        sizes = {DENSE: weights * self._dtype.itemsize}
        if self._has_fourbit:
            sizes[FOUR_BIT] = weights // 2 + weights // 16
        return sizes

    def _times(
        self,
        same: Sequence[DeviceMatrix],
        rows: int,
        timings: Timings,
        measure: Measure | None,
    ) -> Times:
        """Times of all candidates; without a clock zero for our first configuration alone."""
        shape = same[0].shape
        names = list(self._tilings[shape, rows])
        if measure is None:
            return {names[0]: 0.0}
        names += self._sizes(shape)
        known = timings.get(shape, rows, names)
        if known is None:
            known = self._measured(same, rows, names, measure)
            if not any(math.isnan(time) for time in known.values()):
                timings.put(shape, rows, known)
            known = {name: math.inf if math.isnan(t) else t for name, t in known.items()}
        if not any(math.isfinite(known[name]) for name in self._tilings[shape, rows]):
            raise RuntimeError(f"no NF4 kernel for matrices of {shape} works on this device")
        return known

    def _measured(
        self, same: Sequence[DeviceMatrix], rows: int, names: Sequence[str], measure: Measure
    ) -> Times:
        """Times of all candidates, each on so many matrices that the L2 cache does not hold them.

        The copies that are made for this are released again. The time of a candidate that fails is
        infinite. It is NaN if there was too little memory, which may differ at the next start.
        """
        shape, device = same[0].shape, self._device
        sample = same[: _distinct(same[0], device)]
        x = torch.randn(rows, shape[1], device=device).to(self._dtype)
        out = torch.empty(rows, shape[0], dtype=self._dtype, device=device)
        times: dict[str, float] = {}
        for name in names:
            run = self._run(name, shape, rows)
            try:
                if device.type == "cuda":
                    self._prepare(name, sample)
                    _check(run, sample[0], x, out)
                once = _over(run, sample, x, out)
                times[name] = measure(name, shape, rows, once) / len(sample)
            except torch.OutOfMemoryError:
                times[name] = math.nan
            except Exception as error:  # a kernel that fails on this card is no candidate
                _LOGGER.warning("%s cannot multiply %d rows by %s: %s", name, rows, shape, error)
                times[name] = math.inf
            finally:
                self._forget(name, sample)
        return times

    def _prepare(self, name: str, matrices: Sequence[DeviceMatrix]) -> None:
        """Makes the copies that a candidate reads."""
        for matrix in matrices:
            if name == DENSE and matrix not in self._dense:
                copy = torch.empty(matrix.shape, dtype=self._dtype, device=self._device)
                nf4.unpack(matrix, copy)
                self._dense[matrix] = copy
            elif name == FOUR_BIT:
                self._fourbit.prepare(matrix, self._dtype)

    def _forget(self, name: str, matrices: Sequence[DeviceMatrix]) -> None:
        for matrix in matrices:
            if name == DENSE:
                self._dense.pop(matrix, None)
            elif name == FOUR_BIT:
                self._fourbit.forget(matrix)

    def _settle(self, group: Group, same: Sequence[DeviceMatrix]) -> None:
        """Chooses for each matrix of a shape, and makes the copies."""
        for index, matrix in enumerate(same):
            names = [best(group.times[rows], group.copies, index) for rows in self._rows]
            for name in sorted(set(names)):
                self._prepare(name, [matrix])
            self._assign(matrix, names)

    def _assign(self, matrix: DeviceMatrix, names: list[str]) -> None:
        self._names[matrix] = names
        self._chosen[matrix] = [
            self._run(name, matrix.shape, rows)
            for name, rows in zip(names, self._rows, strict=True)
        ]

    def _run(self, name: str, shape: Shape, rows: int) -> Run:
        """The function of a candidate."""
        if name == DENSE:
            return self._multiply_dense
        if name == FOUR_BIT:
            return self._fourbit
        tiling = self._tilings[shape, rows][name]
        return lambda matrix, x, out: nf4.multiply(matrix, x, out, tiling, self._scratch)

    def _multiply_dense(self, matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor) -> None:
        weight = self._dense[matrix]
        if x.device.type == "cpu":  # libraries there choose the order of a sum by the rows
            product = by_tiles(x, weight)
            torch.add(product, matrix.bias if matrix.bias is not None else 0, out=out)
        elif matrix.bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(matrix.bias, x, weight.T, out=out)


def _distinct(matrix: DeviceMatrix, device: torch.device) -> int:
    """Number of matrices that together fill the L2 cache twice."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-2 * cache // matrix.nbytes))


def _over(
    run: Run, sample: Sequence[DeviceMatrix], x: torch.Tensor, out: torch.Tensor
) -> Callable[[], None]:
    def once() -> None:
        for matrix in sample:
            run(matrix, x, out)

    return once


def _check(run: Run, matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor) -> None:
    """Raises ArithmeticError if a candidate's product differs from that of exact weights."""
    weight = torch.empty(matrix.shape, dtype=torch.float32, device=x.device)
    nf4.unpack(matrix, weight)
    expected = x.float() @ weight.T
    if matrix.bias is not None:
        expected += matrix.bias.float()
    out.fill_(math.nan)
    run(matrix, x, out)
    error = ((out.float() - expected).norm() / expected.norm()).item()
    if not error < _TOLERANCE:
        raise ArithmeticError(f"the result is wrong by {error:.3g}")


_REPEATS = 7


def device_time(candidate: str, shape: Shape, rows: int, run: Callable[[], None]) -> float:
    """Median of the microseconds of `run` as a CUDA graph, without the time of the launches."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and allocates what a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        events = [_event() for _ in range(_REPEATS + 1)]
        events[0].record(stream)
        for event in events[1:]:
            graph.replay()
            event.record(stream)
    events[-1].synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    spans = sorted(start.elapsed_time(end) * 1e3 for start, end in pairwise(events))
    return float(spans[len(spans) // 2])


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all measurements: for each stream cuBLAS keeps a workspace for ever."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
