"""S2: every kernel compared with float64, on random inputs and outputs full of NaN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from loraplex_model.adapters.table import SlotTable
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.config import FUSED
from loraplex_model.decoder.attention import Scoring
from loraplex_model.decoder.cuda.kernels import attention, lora, rows
from loraplex_model.decoder.cuda.kernels import nf4 as nf4_kernels
from loraplex_model.decoder.cuda.kernels.heads import HeadFormula, rope_cache
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.pack import pack_matrix
from loraplex_model.decoder.cuda.plan import plan_chunks
from loraplex_model.decoder.cuda.products import Products
from loraplex_model.decoder.cuda.table import DeviceTable
from loraplex_model.decoder.cuda.tiles import plan_tiles
from loraplex_model.decoder.cuda.tilings import Scratch, tilings
from loraplex_model.ops import nf4

from gpu import draws_check, inputs, oracles
from gpu.stage import StageReport

DTYPE = torch.bfloat16
PRODUCT, LORA, ATTENTION, ROWS = 4e-3, 5e-3, 4e-3, 6e-3
"""Largest relative errors. Rounding a result to bfloat16 alone gives 1.7e-3."""


def run(report: StageReport) -> None:
    """Compares all kernels; the sizes of an 8B model on a device, tiny ones without."""
    torch.manual_seed(0)
    for part in (products, unequal_rows, low_rank, paged_attention, row_steps, draws_check.draws):
        before, checks = len(report.failed), report.checks
        part(report)
        bad = len(report.failed) - before
        name = part.__name__.replace("_", " ")
        print(f"    {name}: {report.checks - checks} checks, {bad} failed", flush=True)


def poisoned(*shape: int, device: str, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """A tensor of NaN."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def near(report: StageReport, what: str, found: torch.Tensor, wanted: torch.Tensor, most: float):
    """Checks that `found` is finite and within a relative error of `wanted`."""
    error = oracles.relative(found, wanted)
    report.check(error < most, f"{what}: relative error {error:.2e}, allowed {most:.0e}")


def same_twice(report: StageReport, what: str, first: torch.Tensor, second: torch.Tensor) -> None:
    """Checks that two launches with the same inputs gave the same bits."""
    report.check(torch.equal(first, second), f"{what}: two launches differ")


def products(report: StageReport) -> None:
    """The NF4 product and the unpacking of whole blocks."""
    device = report.device
    shapes = [((192,), 576), ((576,), 1536), ((64, 32, 32), 128)]
    processors, major = 132, 9
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        processors, major = properties.multi_processor_count, properties.major
    row_counts = [1, 3, 17] if report.dry else [1, 3, 16, 17, 64, 200]
    if not report.dry:
        shapes += [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096)]
        shapes += [((4096,), 14336)]
    for modules, fan_in in shapes[2:] if report.dry else shapes:
        matrix = inputs.random_matrix(modules, fan_in, device)
        bias = torch.randn(sum(modules), device=device).to(DTYPE)
        packed = pack_matrix(matrix, bias, device, dtype=DTYPE)
        name = f"product {sum(modules)}x{fan_in}"
        weight = nf4.dequantize(matrix)
        unpacked = poisoned(*matrix.shape, device=device)
        nf4_kernels.unpack(packed, unpacked)
        report.check(torch.equal(unpacked, weight.to(DTYPE)), f"{name}: unpacking is not bit-equal")
        wide = weight.to(DTYPE).double()
        for count in row_counts:
            x = torch.randn(count, fan_in, device=device).to(DTYPE)
            wanted = x.double() @ wide.T + bias.double()
            # Every configuration that a start would measure, and so may choose.
            candidates = tilings(matrix.shape, count, DTYPE, processors, major)
            launches = [(tiling, matrix.shape, count) for tiling in candidates]
            scratch = Scratch.for_launches(launches, device)
            for tiling in candidates[:2] if report.dry else candidates:
                out, again = (poisoned(count, sum(modules), device=device) for _ in range(2))
                nf4_kernels.multiply(packed, x, out, tiling, scratch)
                nf4_kernels.multiply(packed, x, again, tiling, scratch)
                what = f"{name}, {count} rows, {tiling.name}"
                near(report, what, out, wanted, PRODUCT)
                same_twice(report, what, out, again)
        del wide, weight


def unequal_rows(report: StageReport) -> None:
    """A matrix whose rows do not hold whole blocks."""
    matrix = inputs.random_matrix((48, 16), 80, report.device)
    packed = pack_matrix(matrix, None, report.device, dtype=DTYPE)
    x = torch.randn(5, 80, device=report.device).to(DTYPE)
    out = poisoned(5, 64, device=report.device)
    Products([packed], DTYPE, most_rows=8).multiply(packed, x, out)
    wanted = x.double() @ nf4.dequantize(matrix).double().T
    near(report, "product of rows of 80", out, wanted, PRODUCT)


def low_rank(report: StageReport) -> None:
    """LoRA with gains and biases, ranks from 1 to 64, mixes, rows of the base, long prompts."""
    device = report.device
    model = inputs.with_layers(inputs.TINY if report.dry else inputs.LLAMA_8B, 1)
    ranks = [1, 5, 16, 64] if report.dry else [1, 3, 8, 16, 17, 32, 64] * 9
    table = SlotTable(len(ranks) + 2, model)
    for slot, rank in enumerate(ranks):
        template = inputs.adapter_of(model, rank, DTYPE, gains=slot % 3 == 1)
        table.publish(slot, inputs.random_factors(template, device, 0.05))
    mixes: list[tuple[int, Mix]] = [(1, ()), (2 if report.dry else 40, ((0, 1.0),)), (2, ())]
    mixes += [(1, ((slot, 1.0),)) for slot in range(1, len(ranks))]
    mixes += [(3, ((0, 0.5), (1, -0.25), (2, 0.75))), (1, ())]
    batch = ForwardBatch.build([([1] * count, 0, [0], mix) for count, mix in mixes])
    by_row = [mix for count, mix in mixes for _ in range(count)]
    plan = LoraPass.of(plan_chunks(batch, table), DeviceTable(table, torch.device(device)).entries)
    deltas = {slot: table.delta(slot) for slot in range(len(ranks))}
    for fused, modules in FUSED.items():
        shapes = [model.projection_shapes()[module] for module in modules]
        fan_in, widths = shapes[0][0], [out for _, out in shapes]
        x = torch.randn(len(by_row), fan_in, device=device).to(DTYPE)
        base = torch.randn(len(by_row), sum(widths), device=device).to(DTYPE)
        wanted = oracles.with_adapters(x, base, by_row, deltas, 0, modules, widths)
        site = model.site_index((0, modules[0]))
        scratch = torch.full((lora.h_size(plan, fan_in, len(modules)),), float("nan"))
        h = lora.h_view(scratch.to(device), plan, fan_in, len(modules))
        results = []
        for _ in range(2):
            lora.shrink(x, h, plan, site, len(modules))
            y = base.clone()
            lora.expand(h, y, plan, site, widths)
            results.append(y)
        near(report, f"LoRA at {fused}", results[0], wanted, LORA)
        same_twice(report, f"LoRA at {fused}", *results)
        if fused == "gate_up":
            out = poisoned(len(by_row), widths[0], device=device)
            lora.expand_gated(h, base, out, plan, site)
            near(report, "LoRA with SiLU", out, oracles.gated(wanted), LORA)


@dataclass(frozen=True, slots=True)
class Heads:
    """A shape of attention: query and key/value heads, their width, a window, a cap of scores."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float = 0.0


def paged_attention(report: StageReport) -> None:
    """Decode rows and chunks of prompts over a shuffled cache, with grouped heads and windows."""
    cases = [Heads(4, 2, 32), Heads(3, 3, 16, window=20, softcap=2.0)]
    sequences = [(1, 1), (1, 33), (5, 40), (1, 300)]  # new tokens, context
    if not report.dry:
        cases = [Heads(32, 8, 128), Heads(9, 3, 64), Heads(8, 8, 128), Heads(16, 2, 80)]
        cases += [
            Heads(32, 8, 128, window=100),
            Heads(16, 8, 256),
            Heads(16, 8, 256, window=100, softcap=2.0),
        ]
        lengths = (1, 2, 31, 32, 33, 255, 256, 257, 1000, 4097)
        sequences = [(1, length) for length in lengths]
        sequences += [(17, 17), (100, 600), (64, 1000), (200, 200)]
    for case in cases:
        attend(report, case, sequences)


def attend(report: StageReport, case: Heads, sequences: Sequence[tuple[int, int]]) -> None:
    """One shape over all sequences at once, and over each kind of tile."""
    device, size = report.device, 32
    group = case.heads // case.kv_heads
    tables, count = shuffled(sequences, size)
    starts = np.cumsum([0, *(new for new, _ in sequences)], dtype=np.int32)
    contexts = np.array([context for _, context in sequences], np.int32)
    tiles = plan_tiles(starts, contexts, group)
    shape = (count, case.kv_heads, size, case.head_dim)
    keys, values = (torch.randn(shape, device=device).to(DTYPE) for _ in range(2))
    q = torch.randn(int(starts[-1]), case.heads, case.head_dim, device=device).to(DTYPE)
    flat = torch.from_numpy(np.concatenate(tables)).to(device)[:, None]
    begins = np.cumsum([0, *(len(table) for table in tables)])
    for fields in (tiles.short, tiles.tall):
        fields[:, 2] = begins[fields[:, 2]]
    scoring = Scoring(case.window, case.head_dim**-0.5, case.softcap)
    results = []
    for _ in range(2):
        out = poisoned(*q.shape, device=device)
        for fields, chunks in ((tiles.short, tiles.chunks), (tiles.tall, 0)):
            # Tiles behind the count are read by no program; they hold what would be a fault.
            padded = np.concatenate([fields, np.full((3, fields.shape[1]), 1 << 29, np.int32)])
            on_device = attention.DeviceTiles(
                torch.from_numpy(padded).to(device),
                torch.tensor([len(fields)], dtype=torch.int32, device=device),
                chunks,
            )
            floats = attention.scratch_floats(len(padded), chunks, case.heads, case.head_dim)
            scratch = poisoned(max(floats, 1), device=device, dtype=torch.float32)
            arguments = (q, keys, values, flat, on_device)
            if chunks:
                attention.attend_short(*arguments, scratch, out, scoring)
            elif len(fields):
                attention.attend_tall(*arguments, out, scoring)
        results.append(out)
    same_twice(report, f"attention {case}", *results)
    for i, (new, context) in enumerate(sequences):
        mine = slice(int(starts[i]), int(starts[i + 1]))
        positions = range(context - new, context)
        wanted = oracles.attention(q[mine], keys, values, tables[i].tolist(), positions, scoring)
        what = f"attention {case}, {new} of {context} tokens"
        near(report, what, results[0][mine], wanted, ATTENTION)


def shuffled(sequences: Iterable[tuple[int, int]], size: int) -> tuple[list[np.ndarray], int]:
    """Block tables in random order, and the number of blocks."""
    needed = [-(-context // size) for _, context in sequences]
    order = np.random.default_rng(0).permutation(sum(needed) + 1).astype(np.int32)
    ends = np.cumsum(needed)
    return [order[end - n : end] for n, end in zip(needed, ends, strict=True)], len(order)


def row_steps(report: StageReport) -> None:
    """Embedding, norms, rotation with the cache, and the gated activation."""
    device, count = report.device, 7
    # The interpreter drops bits where a device rounds to the nearest bfloat16.
    dtype = torch.float32 if report.dry else DTYPE
    model = inputs.TINY if report.dry else inputs.LLAMA_8B
    hidden, eps = model.hidden_size, model.rms_norm_eps
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    table = random(300, hidden)
    tokens = torch.tensor([5, -1, 299, -2, 300, 0, 7], dtype=torch.int32, device=device)
    last = torch.tensor([11, -1], dtype=torch.int32, device=device)
    out = poisoned(count, hidden, device=device, dtype=dtype)
    rows.embed(tokens, table, last, out)
    wanted = torch.stack([table[5], table[11], table[299], *[table[0] * 0] * 2, table[0], table[7]])
    report.check(torch.equal(out, wanted), "embedding: a row differs")

    x, delta, weight = random(count, hidden), random(count, hidden), random(hidden)
    total = (x.float() + delta.float()).to(dtype)
    normed = poisoned(count, hidden, device=device, dtype=dtype)
    rows.norm_residual(x, delta, weight, normed, eps)
    report.check(torch.equal(x, total), "residual: the sum differs")
    near(report, "norm", normed, oracles.norm(total, weight, eps), ROWS)

    block_size, blocks = 32, 3
    qkv = random(count, (heads + 2 * kv_heads) * width)
    positions = torch.arange(count, dtype=torch.int32, device=device) * 3
    slots = torch.tensor([0, 31, 32, 50, 95, -1, 64], dtype=torch.int32, device=device)
    angles = torch.arange(32, device=device)[:, None] * torch.tensor(
        model.rope_inv_freq, device=device
    )
    cos, sin = angles.cos(), angles.sin()
    for norms in (False, True):
        q_norm, k_norm = (random(width) if norms else None for _ in range(2))
        q = poisoned(count, heads, width, device=device, dtype=dtype)
        cache_shape = (blocks, kv_heads, block_size, width)
        keys, values = (torch.zeros(cache_shape, dtype=dtype, device=device) for _ in range(2))
        rope_cache(
            qkv, positions, slots, cos, sin, q, keys, values, q_norm, k_norm, HeadFormula(eps)
        )
        parts = qkv.view(count, -1, width).split([heads, kv_heads, kv_heads], 1)
        turned = []
        for part, head_norm in ((parts[0], q_norm), (parts[1], k_norm)):
            own = part if head_norm is None else oracles.norm(part, head_norm, eps)
            turned.append(oracles.rotated(own, cos[positions.long()], sin[positions.long()]))
        near(report, f"rotation of queries, norms {norms}", q, turned[0], ROWS)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                at = (slot // block_size, slice(None), slot % block_size)
                near(report, f"cached key {row}, norms {norms}", keys[at], turned[1][row], ROWS)
                report.check(torch.equal(values[at], parts[2][row]), f"cached value {row} differs")
        written = (keys.abs().sum((1, 3)) > 0).sum().item()
        report.check(written == count - 1, f"{written} places of the cache were written, not 6")

    gate_up = random(count, 2 * model.intermediate_size)
    out = poisoned(count, model.intermediate_size, device=device, dtype=dtype)
    rows.activate(gate_up, out)
    near(report, "gated activation", out, oracles.gated(gate_up), ROWS)
