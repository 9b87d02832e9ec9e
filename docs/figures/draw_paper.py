"""Draws the results of the last `make bench-paper`: 4-bit formats, LoRA's ranks and places,
AdaLoRA.

    make figures            (python docs/figures/draw_paper.py)

The figures of a benchmark without results are left unchanged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from draw import BLUE, GREY, RED, save, style

RESULTS = Path("var/bench/paper/results")
MODULES = ("q", "k", "v", "o", "gate", "up", "down")
PLACES = {
    "k": "Wk", "q": "Wq", "v": "Wv", "o": "Wo", "qv": "Wq, Wv", "qkvo": "Wq, Wk, Wv, Wo",
    "all-linear": "all seven, 5 times as many",
}  # fmt: skip


def main() -> int:
    style()
    figures: Mapping[str, Sequence[Callable[[Mapping[str, Any]], str]]] = {
        "quantisation": (formats,),
        "rank": (ranks, places),
        "adalora": (adalora,),
    }
    drawn = []
    for bench, draws in figures.items():
        path = RESULTS / f"{bench}.json"
        if path.exists():
            given = json.loads(path.read_text())
            drawn += [draw(given) for draw in draws]
        else:
            print(f"no {path}: its figures are left unchanged (make bench-paper)")
    print(json.dumps({"drawn": drawn}))
    return 0


def formats(given: Mapping[str, Any]) -> str:
    """Draws errors by distribution of the weights and by block size."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    names = {"NF4+DQ": BLUE, "Int4": RED, "FP4": GREY}
    for at, (shape, errors) in enumerate(given["error"].items()):
        for i, (name, colour) in enumerate(names.items()):
            left.bar(at + 0.27 * (i - 1), 100 * errors[name], 0.25, color=colour)
            left.text(at + 0.27 * (i - 1), 100 * errors[name] + 0.3, f"{100 * errors[name]:.1f}",
                      ha="center", fontsize=7)  # fmt: skip
        left.text(at, -1.2, shape, ha="center", va="top")
    left.set(xticks=[], ylabel="error, % of the weights' norm")
    blocks = given["error_by_block"]
    for name, colour in (("FP4", GREY), ("Int4", RED), ("NF4", BLUE)):
        errors = [100 * error for error in blocks[name]]
        right.plot(blocks["block"], errors, color=colour, marker="o", markersize=3)
        right.text(blocks["block"][1], errors[1] + 0.35, name, color=colour, ha="right")
    right.set(xscale="log", xlabel="weights in a block (Gaussian)")
    right.set_xticks(blocks["block"], [str(block) for block in blocks["block"]])
    right.minorticks_off()
    return _saved(figure, "paper-formats.svg")


def ranks(given: Mapping[str, Any]) -> str:
    """Draws gains by rank, and those of the best directions of the largest rank."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.6))
    lines = {
        "directions": (GREY, "the best r directions of r = 64, capitals"),
        "known": (BLUE, "trained: Python in capitals"),
        "new": (RED, "trained: C++"),
    }
    for key, (colour, label) in lines.items():
        gains = {int(r): mean(gain) for r, gain in given[key].items()}
        most = gains[max(gains)]
        axes.plot(gains.keys(), [100 * gain / most for gain in gains.values()],
                  color=colour, marker="o", markersize=3, label=label)  # fmt: skip
    axes.set(xscale="log", xlabel="r, on Wq and Wv", ylabel="gain, % of that of r = 64",
             ylim=(0, 108))  # fmt: skip
    axes.set_xticks(given["ranks"], [str(r) for r in given["ranks"]])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    return _saved(figure, "paper-rank.svg")


def places(given: Mapping[str, Any]) -> str:
    """Draws gains of the same number of parameters in several places, one dot per seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.4))
    for row, (key, label) in enumerate(PLACES.items()):
        gains = given["places"][key]
        colour = RED if key in "qk" else GREY if key == "all-linear" else BLUE
        axes.barh(row, mean(gains), color=colour, height=0.65)
        axes.plot(gains, [row] * len(gains), "k.", markersize=3)
        axes.text(max(gains) + 0.004, row, label, va="center")
    axes.set(yticks=[], xlabel="what it takes off the base's loss on C++, nats a byte")
    axes.set_xlim(0, 1.5 * max(given["places"]["all-linear"]))
    axes.spines["left"].set_visible(False)
    return _saved(figure, "paper-budget.svg")


def adalora(given: Mapping[str, Any]) -> str:
    """Draws the ranks that AdaLoRA kept, and the loss of its uncut twin without each module."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 2.0), layout="constrained")
    kept = [[mean(cells) for cells in zip(*rows, strict=True)]
            for rows in zip(*given["ranks"], strict=True)]  # fmt: skip
    grown = [[1000 * mean(cells) for cells in zip(*rows, strict=True)]
             for rows in zip(*given["growth"], strict=True)]  # fmt: skip
    titles = ("rank kept", "loss without it, 1/1000 nats a byte")
    for one, grid, title in zip(axes, (kept, grown), titles, strict=True):
        most = max(map(max, grid))
        one.imshow(grid, cmap="Blues", vmin=0, vmax=1.15 * most, aspect="auto")
        for layer, row in enumerate(grid):
            for at, value in enumerate(row):
                one.text(at, layer, f"{value:.1f}", ha="center",
                         va="center", color="white" if value > 0.7 * most else "black")  # fmt: skip
        one.set_title(title, fontsize=9)
        one.set_xticks(range(len(MODULES)), MODULES)
        one.set_yticks(range(len(grid)), [f"layer {layer}" for layer in range(len(grid))])
        one.tick_params(length=0)
        one.spines[:].set_visible(False)
    return _saved(figure, "paper-adalora.svg")


def _saved(figure: object, name: str) -> str:
    save(figure, name)
    return name


if __name__ == "__main__":
    sys.exit(main())
