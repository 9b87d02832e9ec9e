"""Draws the figures of docs/nf4.md with the quantiser that the server uses.

    make figures            (python docs/figures/draw.py)

Prints the numbers behind the figures; the last line of output is one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from loraplex_model.adapters.table import DenseMatrix
from loraplex_model.ops import nf4

HERE = Path(__file__).parent
BLUE, RED, GREY = "#2b6cb0", "#c05621", "#a0aec0"
SIZE, RANK = 1024, 16


def main() -> int:
    style()
    told = {"levels": levels(), "bits": bits(), "retained": retained()}
    print(json.dumps(told))
    return 0


def style() -> None:
    """Common settings of all figures; the same numbers give the same bytes."""
    mpl.use("svg")
    mpl.rcParams.update(
        {
            "svg.hashsalt": "loraplex",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def levels() -> list[float]:
    """Draws the sixteen levels on the density of which they are quantiles."""
    from matplotlib import pyplot as plt

    values = nf4.nf4_code(torch.device("cpu"))
    figure, axes = plt.subplots(figsize=(7, 2.2))
    x = torch.linspace(-1, 1, 400)
    spread = 1 / 1.97  # the outermost quantiles lie at +-1
    axes.fill_between(x, torch.exp(-0.5 * (x / spread) ** 2), color=GREY, alpha=0.35, linewidth=0)
    axes.vlines(values, 0, 1.05, color=BLUE, linewidth=1.2)
    axes.plot(0, 1.12, marker="v", color=RED, clip_on=False)
    axes.text(0, 1.19, "0 is a level of its own", ha="center", color=RED)
    axes.set(xlim=(-1.03, 1.03), ylim=(0, 1.1), yticks=[], xlabel="weight / absmax of its block")
    axes.spines["left"].set_visible(False)
    save(figure, "nf4-levels.svg")
    return [round(value, 4) for value in values.tolist()]


def bits() -> dict[str, float]:
    """Draws the bits per weight of a real matrix, with and without double quantisation."""
    from matplotlib import pyplot as plt

    matrix = nf4.quantise(_gaussian(0))
    count = SIZE * SIZE
    codes = 8 * matrix.packed.nbytes / count
    single = 32 * (count / 64) / count
    double = 8 * (matrix.absmax.nbytes + sum(s.nbytes for s in matrix.absmax_scales) + 4) / count
    figure, axes = plt.subplots(figsize=(7, 1.5))
    for row, (name, extra) in enumerate((("float32 maxima", single), ("double quantised", double))):
        axes.barh(row, codes, color=BLUE, height=0.6)
        axes.barh(row, extra, left=codes, color=RED, height=0.6)
        axes.text(
            codes + extra + 0.03, row, f"{codes + extra:.3f} bits a weight: {name}", va="center"
        )
    axes.set(xlim=(3.5, 6), yticks=[], xlabel="bits (the axis begins at 3.5)")
    axes.spines["left"].set_visible(False)
    save(figure, "nf4-bits.svg")
    return {"codes": codes, "single": round(single, 4), "double": round(double, 4)}


def retained() -> list[dict[str, float]]:
    """Draws the retained part of a merged delta D: <W' - W, D> / |D|^2, W being on the NF4 grid."""
    from matplotlib import pyplot as plt

    base = nf4.dequantize(nf4.quantise(_gaussian(0)))
    a, b = _gaussian(1)[:RANK], _gaussian(2)[:, :RANK]
    direction = b @ a
    direction /= torch.linalg.matrix_norm(direction)
    told = []
    for size in (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3):
        delta = direction * size * torch.linalg.matrix_norm(base)
        merged = base + delta
        told.append(
            {
                "size": size,
                "nf4": _kept(nf4.dequantize(nf4.quantise(merged)) - base, delta),
                "bfloat16": _kept(
                    DenseMatrix(merged.bfloat16(), None).weight.float() - base, delta
                ),
            }
        )
    figure, axes = plt.subplots(figsize=(7, 2.6))
    sizes = [100 * row["size"] for row in told]
    axes.plot(sizes, [100 * row["bfloat16"] for row in told], color=BLUE, marker="o", markersize=3)
    axes.plot(sizes, [100 * row["nf4"] for row in told], color=RED, marker="o", markersize=3)
    axes.text(0.32, 91, "dense copy in bfloat16", color=BLUE)
    axes.text(0.9, 12, "merged into NF4", color=RED)
    axes.set(xscale="log", xlabel="size of the delta, % of the weight's norm",
             ylabel="% of the delta kept", ylim=(-3, 108))  # fmt: skip
    axes.set_xticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    axes.minorticks_off()
    save(figure, "nf4-retained.svg")
    return [{key: round(value, 4) for key, value in row.items()} for row in told]


def _kept(change: torch.Tensor, delta: torch.Tensor) -> float:
    return float((change.double() * delta.double()).sum() / delta.double().pow(2).sum())


def _gaussian(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, SIZE, generator=random) / math.sqrt(SIZE)


def save(figure: object, name: str) -> None:
    """Saves the figure in this folder, without a date."""
    figure.savefig(  # type: ignore[attr-defined]
        HERE / name, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )


if __name__ == "__main__":
    sys.exit(main())
