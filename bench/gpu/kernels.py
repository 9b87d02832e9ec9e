"""S3: times of the kernels on the shapes of an 8B model, compared with bitsandbytes and torch.

Every figure is the device's time alone: calls over different weights, more of them than the L2
cache holds, in one CUDA graph. "step" is the sum over the layers of the model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from loraplex_model.adapters.table import SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import FUSED
from loraplex_model.decoder.attention import Scoring
from loraplex_model.decoder.cuda.draws import DrawTable
from loraplex_model.decoder.cuda.kernels import attention, lora, sampling
from loraplex_model.decoder.cuda.kernels import nf4 as nf4_kernels
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.pack import DeviceMatrix, pack_matrix
from loraplex_model.decoder.cuda.plan import plan_chunks
from loraplex_model.decoder.cuda.products import Products
from loraplex_model.decoder.cuda.table import DeviceTable
from loraplex_model.decoder.cuda.tiles import plan_tiles
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.messages import SamplingParams

from gpu import draws_check, inputs
from gpu.stage import StageReport
from gpu.timing import replay_seconds

DTYPE = torch.bfloat16
ROWS = (1, 4, 16, 64, 256)
COPIES = 8
"""Matrices of a shape; the smallest shape then fills an L2 cache of 50 MB."""

SLOWER = 1.05
"""Largest ratio of our product's time to bitsandbytes', above 1 because measurements vary."""

COMPARED_ROWS = 64
"""Up to so many rows a product may not be slower than bitsandbytes'."""


def run(report: StageReport) -> None:
    """Measures products, adapters, attention and draws, as long as there is time."""
    torch.manual_seed(0)
    for part in (products, adapters, contexts, draws):
        if report.left < 5:
            report.note(f"no time was left to measure {part.__name__}")
            continue
        part(report)
        gc.collect()
        if report.device == "cuda":
            torch.cuda.empty_cache()


def products(report: StageReport) -> None:
    """Milliseconds of a step's products: ours as chosen at start, bitsandbytes', dense ones."""
    device = report.device
    model = inputs.TINY if report.dry else inputs.LLAMA_8B
    row_counts = (1, 3) if report.dry else ROWS
    totals = {name: dict.fromkeys(row_counts, 0.0) for name in ("ours", "bitsandbytes", "dense")}
    lines: list[list[object]] = []
    for modules in FUSED.values():
        shapes = [model.projection_shapes()[module] for module in modules]
        fan_in, widths = shapes[0][0], [out for _, out in shapes]
        copies = 1 if report.dry else COPIES
        matrices = [
            pack_matrix(inputs.random_matrix(widths, fan_in, device), None, device, dtype=DTYPE)
            for _ in range(copies)
        ]
        room = 0 if report.dry else torch.cuda.mem_get_info()[0] // 4
        chosen = Products(matrices, DTYPE, most_rows=max(row_counts), copy_bytes=room)
        runs = {"ours": chosen.multiply, **rivals(matrices, device)}
        for rows in row_counts:
            x = torch.randn(rows, fan_in, device=device).to(DTYPE)
            out = torch.empty(rows, sum(widths), dtype=DTYPE, device=device)
            times: dict[str, float] = {}
            for name, run_one in runs.items():
                calls = [partial(run_one, matrix, x, out) for matrix in matrices]
                times[name] = replay_seconds(calls, device) / copies
                totals[name][rows] += model.num_layers * times[name] * 1e3
            weights = sum(widths) * fan_in
            tb_s = weights * 0.516 / times["ours"] / 1e12
            others = [times.get(name, float("nan")) * 1e6 for name in ("bitsandbytes", "dense")]
            shape = f"{sum(widths)}x{fan_in}"
            lines.append([shape, rows, times["ours"] * 1e6, *others, tb_s])
            if not report.dry and "bitsandbytes" in times and rows <= COMPARED_ROWS:
                slower = times["ours"] / times["bitsandbytes"]
                report.check(
                    slower <= SLOWER,
                    f"product {shape}, {rows} rows: {slower:.2f} times bitsandbytes' time",
                )
        report.figure(f"choices_{sum(widths)}x{fan_in}", choices(chosen))
    head = ["product", "rows", "ours us", "bitsandbytes us", "dense us", "NF4 TB/s"]
    report.table(head, lines)
    for name, total in totals.items():
        if any(total.values()):
            report.figure(f"products_{name}_ms", {str(rows): ms for rows, ms in total.items()})


def choices(chosen: Products) -> dict[str, object]:
    """What was chosen for each number of rows, and the times of all candidates."""
    return {
        str(choice.rows): {"chosen": dict(choice.chosen), "us": dict(choice.times)}
        for choice in chosen.report()
    }


Run = Callable[[DeviceMatrix, torch.Tensor, torch.Tensor], object]


def rivals(matrices: list[DeviceMatrix], device: str) -> dict[str, Run]:
    """The products of bitsandbytes, if it is there, and of torch with dense copies."""
    found: dict[str, Run] = {}
    if device == "cuda" and find_spec("bitsandbytes") is not None:
        from loraplex_model.decoder.cuda.fourbit import FourBit

        peer = FourBit()
        for matrix in matrices:
            peer.prepare(matrix, DTYPE)
        found["bitsandbytes"] = peer
    dense = {matrix: torch.empty(matrix.shape, dtype=DTYPE, device=device) for matrix in matrices}
    for matrix, weight in dense.items():
        nf4_kernels.unpack(matrix, weight)
    found["dense"] = lambda matrix, x, out: torch.mm(x, dense[matrix].T, out=out)
    return found


def adapters(report: StageReport) -> None:
    """Milliseconds of a step's shrink and expand, 64 rows, by the number of adapters."""
    device, rank = report.device, 16
    layers, rows = (1, 4) if report.dry else (4, 64)
    model = inputs.with_layers(inputs.TINY if report.dry else inputs.LLAMA_8B, layers)
    counts = (1, 3) if report.dry else (1, 16, 64)
    table = SlotTable(max(counts), model)
    template = inputs.adapter_of(model, rank, DTYPE)
    for slot in range(max(counts)):
        table.publish(slot, inputs.random_copy(template, device, 0.02))
    entries = DeviceTable(table, torch.device(device)).entries
    factor = (2 if report.dry else inputs.LLAMA_8B.num_layers) / layers
    found: dict[str, float] = {}
    for count in counts:
        slots = sorted(row % count for row in range(rows))
        batch = ForwardBatch.build([([1], 0, [0], ((slot, 1.0),)) for slot in slots])
        plan = LoraPass.of(plan_chunks(batch, table), entries)
        calls = []
        for layer in range(layers):
            for modules in FUSED.values():
                calls.append(low_rank_call(model, layer, modules, rows, plan, device))
        found[str(count)] = replay_seconds(calls, device) * factor * 1e3
    report.figure("lora_ms", found)
    report.table(["adapters", "LoRA ms a step"], [[name, ms] for name, ms in found.items()])


def low_rank_call(
    model: inputs.DecoderConfig,
    layer: int,
    modules: tuple[str, ...],
    rows: int,
    plan: LoraPass,
    device: str,
) -> Callable[[], object]:
    """Shrink and expand of one fused matrix."""
    shapes = [model.projection_shapes()[module] for module in modules]
    fan_in, widths = shapes[0][0], [out for _, out in shapes]
    x = torch.randn(rows, fan_in, device=device).to(DTYPE)
    y = torch.zeros(rows, sum(widths), dtype=DTYPE, device=device)
    floats = torch.empty(lora.h_size(plan, fan_in, len(modules)), device=device)
    h = lora.h_view(floats, plan, fan_in, len(modules))
    active = torch.empty(rows, widths[0], dtype=DTYPE, device=device)
    site = model.site_index((layer, modules[0]))

    def call() -> None:
        lora.shrink(x, h, plan, site, len(modules))
        if modules[0] == "gate_proj":
            lora.expand_gated(h, y, active, plan, site)
        else:
            lora.expand(h, y, plan, site, widths)

    return call


def contexts(report: StageReport) -> None:
    """Milliseconds of a step's attention for decode rows, and the share of the copy's bandwidth."""
    device, size = report.device, 32
    model = inputs.TINY if report.dry else inputs.LLAMA_8B
    layers = 1 if report.dry else 4
    cases = [(2, 40)] if report.dry else [(1, 1024), (64, 1024), (8, 8192), (256, 1024)]
    copy = report.other("S0").get("copy_tb_s") or 3.0
    lines: list[list[object]] = []
    for sequences, context in cases:
        blocks = -(-context // size)
        shape = (sequences * blocks, model.num_kv_heads, size, model.head_dim)
        caches = [
            [torch.randn(shape, device=device, dtype=DTYPE) for _ in range(2)]
            for _ in range(layers)
        ]
        order = torch.randperm(sequences * blocks, device=device).int()[:, None]
        tiles = plan_tiles(
            np.arange(sequences + 1, dtype=np.int32),
            np.full(sequences, context, np.int32),
            model.num_heads // model.num_kv_heads,
        )
        tiles.short[:, 2] *= blocks
        on_device = attention.DeviceTiles(
            torch.from_numpy(tiles.short).to(device),
            torch.tensor([sequences], dtype=torch.int32, device=device),
            tiles.chunks,
        )
        heads = (model.num_heads, model.head_dim)
        q = torch.randn(sequences, *heads, device=device, dtype=DTYPE)
        out = torch.empty_like(q)
        floats = attention.scratch_floats(sequences, tiles.chunks, *heads)
        scratch = torch.empty(max(floats, 1), device=device)
        scoring = Scoring(None, model.head_dim**-0.5)
        calls = [
            partial(attention.attend_short, q, k, v, order, on_device, scratch, out, scoring)
            for k, v in caches
        ]
        time = replay_seconds(calls, device) / layers
        nbytes = 2 * sequences * context * model.kv_size * DTYPE.itemsize
        share = nbytes / time / 1e12 / copy
        lines.append([f"{sequences} x {context}", time * model.num_layers * 1e3, share])
        report.figure(f"attention_{sequences}x{context}_ms", lines[-1][1])
    report.table(["rows x context", "attention ms a step", "of a copy's bandwidth"], lines)


def draws(report: StageReport) -> None:
    """Microseconds of choosing 64 tokens from 128,256, by sort of draw."""
    device = report.device
    rows, vocab = (2, 300) if report.dry else (64, 128_256)
    lines: list[list[object]] = []
    for case in draws_check.CASES:
        own = [Draw(SamplingParams(**case.values, seed=seed), prompt=[3]) for seed in range(rows)]
        orders = [draws_check.order_of(draw) for draw in own]
        table = DrawTable.of(orders, np.arange(rows, dtype=np.int32))
        on_device = sampling.DeviceDraws(
            torch.from_numpy(table.records).to(device),
            torch.from_numpy(table.lists).to(device),
            torch.tensor([rows], dtype=torch.int32, device=device),
        )
        logits = torch.randn(rows, vocab, device=device) * 4
        tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        kept = sampling.workspace(rows, torch.device(device))
        copies = [logits.clone() for _ in range(1 if report.dry else 4)]

        calls = [partial(sampling.sample, own, on_device, tokens, kept) for own in copies]
        time = replay_seconds(calls, device) / len(copies)
        lines.append([case.name, time * 1e6])
    report.figure("draws_us", {str(name): us for name, us in lines})
    report.table([f"{rows} draws", "us"], lines)
