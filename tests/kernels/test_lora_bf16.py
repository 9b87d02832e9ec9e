"""Adapters' factors on rows of bfloat16: their values, and that bits depend on the row alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref

import numpy as np
import pytest
import torch
from kernels.conftest import BF16_ISAS, SOFTWARE
from kernels.test_kernels import CFused, lora_config, pointer, random_delta
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.adapters.table import SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.decoder import layout
from loraplex_model.ops import build

TILES = 2
ROUNDED = 2**-8
"""The largest relative error of a number that is rounded to bfloat16."""
SUMMED = 2**-24
"""The largest relative error of one sum or product of float32."""

Mix = tuple[tuple[int, float], ...]
RANKS = [16, 1, 8, 64, 5, 33, 2, 100]


class Adapters:
    """A slot table of random adapters, one for each rank, at the first three projections."""

    def __init__(self, fan_in: int, out: int, ranks: Sequence[int], scale: float = 1) -> None:
        self.config = lora_config(fan_in, out)
        self.table = SlotTable(len(ranks), self.config)
        self.out = out
        rng = np.random.default_rng(fan_in + out)
        torch.manual_seed(fan_in * 1000 + out)
        for slot, rank in enumerate(ranks):
            sites = {(1, PROJECTIONS[0]): self._factors(rank, scale)}
            for name in PROJECTIONS[1:3]:
                change = random_delta(rng, rank, fan_in, out)
                sites[1, name] = self._factors(rank, scale) if change.a is not None else change
            self.table.publish(slot, pack(AdapterDelta(sites), torch.bfloat16))

    def _factors(self, rank: int, scale: float) -> ProjectionDelta:
        a, b = torch.randn(rank, self.config.hidden_size), torch.randn(rank, self.out)
        return ProjectionDelta(a=a * scale, b=b * scale, gain=None, bias=None)

    def apply(
        self,
        library: ctypes.CDLL,
        runs: Sequence[tuple[int, Mix]],
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:
        """y [rows, 3 * out] with the changes of sequences of so many rows and such mixes."""
        batch = ForwardBatch.build([([0] * rows, 0, [0], mix) for rows, mix in runs])
        assert len(batch.tokens) == len(x) == len(y)
        fused = CFused(3, (0, 1, 2), (0, self.out, 2 * self.out), (self.out,) * 3)
        y = y.clone()
        library.loraplex_lora_bf16(
            byref(layout.c_adapters(self.table)),
            byref(layout.c_batch(batch)),
            byref(fused),
            1,
            pointer(x),
            x.shape[1],
            pointer(y),
            y.shape[1],
        )
        return y

    def exact(
        self, mix: Mix, x: torch.Tensor, y: torch.Tensor, hidden_error: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The changed y in float64 and a bound on each element's error."""
        x, want = x.bfloat16().double(), y.double()
        error = torch.zeros_like(want)
        for part, name in enumerate(PROJECTIONS[:3]):
            found = [(self.table.delta(s).at((1, name), ProjectionDelta), w) for s, w in mix]
            at = slice(part * self.out, (part + 1) * self.out)
            gain, terms = torch.ones(self.out, dtype=torch.float64), len(found)
            for change, weight in found:
                if change is not None and change.gain is not None:
                    gain = gain + weight * (change.gain.double() - 1)
            want[:, at] *= gain
            size = want[:, at].abs()
            for change, weight in found:
                if change is None:
                    continue
                if change.bias is not None:
                    want[:, at] += weight * change.bias.double()
                    size = size + (weight * change.bias.double()).abs()
                if change.a is None or change.b is None:
                    continue
                a, b = change.a.double(), change.b.double()
                want[:, at] += weight * (x @ a.T) @ b
                sums = (abs(weight) * (x.abs() @ a.abs().T)) @ b.abs()
                error[:, at] += hidden_error * (weight * (x @ a.T)).abs() @ b.abs()
                error[:, at] += SUMMED * (x.shape[1] + len(a)) * sums
                size = size + sums
            error[:, at] += SUMMED * 8 * (terms + 1) * size
        return want, error


def hidden_error(library: ctypes.CDLL) -> float:
    """Only the order of AMX rounds A x."""
    return ROUNDED * (1 + ROUNDED) if library.loraplex_bf16_order() == TILES else 0.0


@pytest.mark.parametrize(("fan_in", "out"), [(64, 32), (1, 1), (48, 80), (81, 33), (576, 192)])
def test_changes_are_those_of_the_factors(bf16_library: ctypes.CDLL, fan_in: int, out: int) -> None:
    adapters = Adapters(fan_in, out, RANKS)
    mixes: list[Mix] = [((slot, 1.0),) for slot in range(len(RANKS))]
    blends: list[Mix] = [((0, 0.5), (3, -1.5)), ((5, 2.0), (1, 1.0), (7, 0.25))]
    lengths = [1, 1, 4, 40, 3, 1, 16, 9, 1, 33]
    runs = list(zip(lengths, [*mixes, *blends], strict=True))
    runs.insert(2, (5, ()))
    rows = sum(count for count, _ in runs)
    x, y = torch.randn(rows, fan_in), torch.randn(rows, 3 * out)
    got = adapters.apply(bf16_library, runs, x, y)
    start = 0
    for count, mix in runs:
        part = slice(start, start + count)
        start += count
        if not mix:
            assert torch.equal(got[part], y[part]), "a base row was touched"
            continue
        want, error = adapters.exact(mix, x[part], y[part], hidden_error(bf16_library))
        assert ((got[part].double() - want).abs() <= error).all(), mix


@pytest.mark.parametrize("rank", [1, 7, 16, 40])
@pytest.mark.parametrize("rows", [1, 3, 16, 37])
def test_small_whole_numbers_give_exact_sums(
    bf16_library: ctypes.CDLL, rank: int, rows: int
) -> None:
    """All sums are whole and |A x| <= 256, so that nothing is rounded and no order matters."""
    fan_in, out = 290, 50
    adapters = Adapters(fan_in, out, [rank])
    delta = adapters.table.delta(0).at((1, PROJECTIONS[0]), ProjectionDelta)
    assert delta is not None
    assert delta.a is not None
    assert delta.b is not None
    delta.a.copy_(torch.randint(-1, 2, delta.a.shape))
    delta.a[:, 256:] *= torch.rand(fan_in - 256) < 0
    delta.a[:, -1] = 1  # the last input counts
    delta.a[:, 0] = 0
    delta.b.copy_(torch.randint(-3, 4, delta.b.shape))
    x, y = torch.randint(-1, 2, (rows, fan_in)).float(), torch.zeros(rows, 3 * out)
    got = adapters.apply(bf16_library, [(rows, ((0, 1.0),))], x, y)[:, :out]
    assert torch.equal(got.double(), x.double() @ delta.a.double().T @ delta.b.double())


@pytest.mark.parametrize("scale", [1.0, 2.0**-70], ids=["usual", "subnormal"])
@pytest.mark.parametrize(("fan_in", "out"), [(64, 96), (81, 33)])
def test_bits_depend_neither_on_the_segment_nor_on_the_place(
    bf16_library: ctypes.CDLL, fan_in: int, out: int, scale: float
) -> None:
    """Small scales give products below the smallest normal float32, which AMX takes as zero."""
    adapters = Adapters(fan_in, out, [16, 5, 40], scale)
    x, y = torch.randn(500, fan_in), torch.randn(500, 3 * out) * scale**2
    mixes: list[Mix] = [((0, 1.0),), ((1, 1.0),), ((2, 1.0), (0, -0.5))]
    for mix in mixes:
        whole = adapters.apply(bf16_library, [(500, mix)], x, y)
        for count in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 40):
            for before in (0, 1, 7, 15):
                first = 16 * count % (500 - count - before)
                rows = slice(first, first + before + count)
                runs: list[tuple[int, Mix]] = [(1, mixes[i % 2]) for i in range(before)]
                got = adapters.apply(bf16_library, [*runs, (count, mix)], x[rows], y[rows])
                part = slice(first + before, first + before + count)
                assert torch.equal(got[before:], whole[part]), (mix, count, before)


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_instructions_give_the_bits_of_the_software_version(isa: str) -> None:
    hardware = build.load(isa)
    software = build.load(*SOFTWARE[hardware.loraplex_bf16_order() - 1])
    adapters = Adapters(576, 112, RANKS)
    runs: list[tuple[int, Mix]] = [(1 + 11 * i % 29, ((i, 1.0),)) for i in range(len(RANKS))]
    rows = sum(count for count, _ in runs)
    x, y = torch.randn(rows, 576), torch.randn(rows, 3 * 112)
    got = [adapters.apply(library, runs, x, y) for library in (hardware, software)]
    assert torch.equal(*got)
