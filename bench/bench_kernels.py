"""Compares the NF4 product with those of bitsandbytes and torch on this machine.

    python bench/bench_kernels.py            (make bench-kernels)

For each shape and number of rows the table shows the milliseconds of our product with NF4 weights,
of bitsandbytes' `matmul_4bit` with the same weights, and of torch's dense float32 product. The last
line of output is one JSON object with the geometric means of the ratios.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from ctypes import byref, c_void_p
from functools import partial

import torch
from loraplex_model.decoder import layout
from loraplex_model.decoder.layout import CMatrix
from loraplex_model.ops import build, nf4

SHAPES = [(960, 576), (3072, 576), (576, 1536), (2048, 2048)]
ROWS = [1, 4, 16, 64, 256]


def milliseconds(call: Callable[[], object]) -> float:
    """Median duration of calls for a third of a second, after two calls for warm-up."""
    call()
    call()
    times: list[float] = []
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Prints the table and the JSON line."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as bnb_functional

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    library = build.load()
    threads = torch.get_num_threads()
    print(f"kernels {library.isa}, {threads} threads; milliseconds\n")
    heads = f"{'ours':>8} {'bitsandbytes':>13} {'torch f32':>10} {'GFLOP/s':>8}"
    print(f"{'out x in':>12} {'rows':>5} {heads}")
    over_bnb: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for out, fan_in in SHAPES:
        weight = torch.randn(out, fan_in)
        matrix = nf4.quantise(weight)
        codes, scales = layout.nf4_panels(
            library, matrix.packed, nf4.absmax_float(matrix), out, fan_in
        )
        ours = CMatrix(data=codes.data_ptr(), absmax=scales.data_ptr(), out=out, in_=fan_in)
        theirs, state = bnb_functional.quantize_4bit(
            weight, quant_type="nf4", blocksize=64, compress_statistics=True
        )
        for rows in ROWS:
            x, y = torch.randn(rows, fan_in), torch.empty(rows, out)
            mine = milliseconds(
                partial(
                    library.loraplex_matmul,
                    byref(ours),
                    c_void_p(x.data_ptr()),
                    rows,
                    c_void_p(y.data_ptr()),
                    threads,
                )
            )
            peer = milliseconds(partial(bnb.matmul_4bit, x, theirs.t(), state))
            dense = milliseconds(partial(torch.matmul, x, weight.T))
            over_bnb[rows].append(peer / mine)
            flops = 2 * rows * out * fan_in / mine / 1e6
            times = f"{mine:8.3f} {peer:13.3f} {dense:10.3f} {flops:8.0f}"
            print(f"{out:>6} x{fan_in:>5} {rows:>5} {times}")
    means = {
        f"over_bitsandbytes_{rows}": math.prod(r) ** (1 / len(r)) for rows, r in over_bnb.items()
    }
    print(
        json.dumps({name: round(value, 2) for name, value in means.items()} | {"isa": library.isa})
    )


if __name__ == "__main__":
    main()
