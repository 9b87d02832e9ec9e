"""What `loraplex-server doctor` reports about the packages and products of a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path


def examine(cache: Path, dtype: str) -> Iterator[tuple[str, str]]:
    """Subjects and findings. Reads `cache`, and measures nothing.

    A missing package is no fault: a slower implementation is used instead.
    """
    import torch
    from loraplex_model.decoder import flash
    from loraplex_model.decoder.cuda import support
    from loraplex_model.ops.dtypes import BY_NAME

    device, number = torch.device("cuda"), BY_NAME[dtype]
    triton = support.obstacle_to_triton()
    yield "kernels", "Triton, compiled at the first start" if triton is None else _without(triton)
    fourbit = support.obstacle_to_bitsandbytes(torch.version.cuda)
    yield "4-bit products", fourbit or f"bitsandbytes has a library for CUDA {torch.version.cuda}"
    attention = flash.obstacle(device, number, head_dim=64, block_size=flash.BLOCK)
    yield "varlen_attn", attention or "torch's paged attention has the options that are needed"
    if triton is None and torch.cuda.is_available():
        yield from products(cache, support.card_name(device, number))


def products(cache: Path, card: str) -> Iterator[tuple[str, str]]:
    """The measured times of products on a card, one row for each shape and number of rows."""
    from loraplex_model.decoder.cuda.choices import FILE, Timings

    rows = Timings(cache / "kernels" / FILE, card).rows()
    if not rows:
        yield "products", "not measured on this card yet; the first start does so"
    for (out, fan_in), count, times in rows:
        yield "products", f"{out} x {fan_in}, up to {count} rows: {_ranking(times)}"


def _ranking(times: Mapping[str, float]) -> str:
    """The fastest of our kernels, and what else was measured, the fastest first."""
    ours = [name for name in times if name.startswith("nf4 ")]
    fastest = min(ours, key=lambda name: times[name], default="")
    shown = [name for name in times if name == fastest or name not in ours]
    return ", ".join(
        f"{name} {times[name]:.1f} us" if math.isfinite(times[name]) else f"{name} failed"
        for name in sorted(shown, key=lambda name: times[name])
    )


def _without(obstacle: str) -> str:
    return f"torch and bitsandbytes, whose launches grow with the number of adapters: {obstacle}"
