"""Merges and unmerges an adapter many times, and checks that the base has not changed.

    python bench/merge_cycles.py --cycles 1000

Hashes all packed NF4 bytes of the default model before and after, and compares the logits of a
prompt bit by bit. The adapter changes one layer only, so that a cycle takes milliseconds. The last
line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import base
import report

LAYER, RANK = 3, 8
PROMPT = tuple(range(300, 332))


def run(cache: Path, cycles: int) -> dict[str, object]:
    """Returns `merge_cycles`, `packed_hash_equal`, `logits_equal` and the duration of a cycle."""
    import torch
    from loraplex_model.adapters.delta import LoraFactors, lora
    from loraplex_model.adapters.pack import pack
    from loraplex_model.base.batch import ForwardBatch
    from loraplex_model.base.weights import BaseWeights
    from loraplex_model.checkpoints.load import load_base
    from loraplex_model.decoder.native import NativeDecoder
    from loraplex_model.ops import build

    def packed_hash(weights: BaseWeights) -> str:
        digest = hashlib.sha256()
        for layer in weights.layers:
            for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
                for tensor in (matrix.packed, matrix.absmax, *matrix.absmax_scales):
                    digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    weights = load_base("default", torch.bfloat16, cache).weights
    library = build.load(directory=cache / "kernels")
    decoder = NativeDecoder(weights, 4, 16, 1, max_positions=64, library=library)
    generator = torch.Generator().manual_seed(0)
    adapter = pack(
        lora(
            {
                (LAYER, name): LoraFactors(
                    torch.randn(RANK, fan_in, generator=generator) * fan_in**-0.5,
                    torch.randn(fan_out, RANK, generator=generator) * 0.05,
                    1.0,
                )
                for name, (fan_in, fan_out) in weights.config.projection_shapes().items()
            }
        ),
        torch.bfloat16,
    )
    decoder.table.publish(0, adapter)
    batch = ForwardBatch.build([(list(PROMPT), 0, [0, 1], ((0, 1.0),))])
    before, hashed = decoder.forward(batch), packed_hash(weights)
    changed = 0
    began = time.perf_counter()
    for cycle in range(cycles):
        decoder.table.publish_merge(0, decoder.merge(adapter, torch.float32))
        if cycle % 100 == 0:
            changed += not torch.equal(decoder.forward(batch), before)
        decoder.table.remove_merge(0)
    seconds = time.perf_counter() - began
    if not changed:
        raise RuntimeError("merged rows were never computed with the dense copies")
    return {
        "merge_cycles": cycles,
        "packed_hash_equal": packed_hash(weights) == hashed,
        "logits_equal": torch.equal(decoder.forward(batch), before),
        "cycle_ms": 1e3 * seconds / cycles,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Merge and unmerge repeatedly, and compare the base."
    )
    parser.add_argument("--cache", type=Path, default=base.CACHE)
    parser.add_argument("--cycles", type=int, default=1000)
    args = parser.parse_args(argv)
    result = run(args.cache, args.cycles)
    print(report.json_line(result))
    return 0 if result["packed_hash_equal"] and result["logits_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
