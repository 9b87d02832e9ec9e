"""Measures the gain of merging: time of a step with one adapter, merged over unmerged.

    python bench/merge_gain.py --rank 16 --rounds 40
    python bench/merge_gain.py --rank 64 --rounds 40

Measures steps of the default model with 1, 4, 16 and 64 decode rows at 128 tokens of context, and
with one prompt chunk of 128 tokens. Merged and unmerged steps alternate, and the ratio is that of
their medians: below 1, merging is faster. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import base
import report

CONTEXT, BLOCK = 128, 16
DECODE_ROWS = (1, 4, 16, 64)


def run(cache: Path, rank: int, rounds: int) -> dict[str, object]:
    """Returns the ratios by the type of the dense copies and the shape of the step."""
    import torch
    from loraplex_model.adapters.pack import pack
    from loraplex_model.base.batch import ForwardBatch
    from loraplex_model.checkpoints.load import load_base
    from loraplex_model.decoder.native import NativeDecoder
    from loraplex_model.ops import build

    weights = load_base("default", torch.bfloat16, cache).weights
    library = build.load(directory=cache / "kernels")
    blocks = (CONTEXT // BLOCK + 1) * max(DECODE_ROWS)
    decoder = NativeDecoder(weights, blocks, BLOCK, 1, max_positions=2 * CONTEXT, library=library)
    adapter = pack(random_lora(weights.config, rank), torch.bfloat16)
    decoder.table.publish(0, adapter)
    each = CONTEXT // BLOCK + 1
    mix = ((0, 1.0),)
    steps = {
        f"decode_{rows}": ForwardBatch.build(
            [([300 + r], CONTEXT, list(range(r * each, (r + 1) * each)), mix) for r in range(rows)]
        )
        for rows in DECODE_ROWS
    }
    steps["prefill_128"] = ForwardBatch.build([(list(range(300, 428)), 0, list(range(each)), mix)])
    result: dict[str, object] = {"rank": rank, "instructions": decoder.isa}
    for dtype in (torch.bfloat16, torch.float32):
        merged = decoder.merge(adapter, dtype)
        for name, batch in steps.items():
            times: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(2 * rounds + 4):
                dense = bool(turn % 2)
                if dense:
                    decoder.table.publish_merge(0, merged)
                else:
                    decoder.table.remove_merge(0)
                began = time.perf_counter()
                decoder.forward(batch)
                if turn >= 4:
                    times[dense].append(time.perf_counter() - began)
            unmerged, with_copies = (statistics.median(times[way]) for way in (False, True))
            key = f"{name}_{str(dtype).removeprefix('torch.')}"
            result[key] = round(with_copies / unmerged, 3)
            print(f"{key:24} unmerged {1e3 * unmerged:7.2f} ms  merged/unmerged {result[key]}")
        decoder.table.remove_merge(0)
    return result


def random_lora(config, rank: int):
    """A random LoRA of all linear layers of the model, with scale 1."""
    import torch
    from loraplex_model.adapters.delta import LoraFactors, lora

    generator = torch.Generator().manual_seed(0)
    return lora(
        {
            (layer, name): LoraFactors(
                torch.randn(rank, fan_in, generator=generator) * fan_in**-0.5,
                torch.randn(fan_out, rank, generator=generator) * 0.05,
                1.0,
            )
            for layer in range(config.num_layers)
            for name, (fan_in, fan_out) in config.projection_shapes().items()
        }
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the time of merged and unmerged steps.")
    parser.add_argument("--cache", type=Path, default=base.CACHE)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each kind")
    args = parser.parse_args(argv)
    print(report.json_line(run(args.cache, args.rank, args.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
