"""The results of `bench_peers.py`: tables in Markdown, a figure, and a file for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import report

from peers.ceilings import Ceilings
from peers.face import Run
from peers.ratios import OURS, Rates, Spread, over, over_best, peers_of


@dataclass(slots=True)
class Results:
    """Everything that was measured.

    Attributes:
        machine: the processor, its cores, and the load before.
        runs: `runs[case][program]`, a run for each round.
        about: settings of each program.
        skipped: why programs or cases are missing, a sentence each.
        summary: the figures of the JSON line.
    """

    machine: Mapping[str, object]
    ceilings: Ceilings | None = None
    runs: dict[str, dict[str, list[Run]]] = field(default_factory=dict)
    about: dict[str, Mapping[str, object]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    summary: dict[str, object] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """Output tokens per second by case, program and round."""
        return {
            case: {program: [run.output_tok_s for run in runs] for program, runs in found.items()}
            for case, found in self.runs.items()
        }

    @property
    def programs(self) -> list[str]:
        """Ours first, then the others in the order in which they were first measured."""
        names = dict.fromkeys(name for found in self.runs.values() for name in found)
        return [OURS, *(name for name in names if name != OURS)]


def markdown(results: Results) -> str:
    """The whole report."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    peers = [name for name in results.programs if name != OURS]
    lines = ["# Loraplex and its peers", "", f"Machine: {machine}.", ""]
    lines += ["Output tokens per second end to end (prompts included), medians of the rounds;"]
    lines += ["ratios are Loraplex over the peer, with the smallest and the largest round.", ""]
    head = ["case", *results.programs, *(f"over {peer}" for peer in peers), "over the best"]
    lines += table(head, [_row(results, case, peers) for case in results.runs])
    lines += ["", "Milliseconds between two tokens of a stream, and to the first token:", ""]
    lines += table(["case", *results.programs], [_times(results, case) for case in results.runs])
    lines += ["", *(f"- {name}: {value}" for name, value in figures(results).items())]
    lines += [f"- {sentence}" for sentence in results.skipped]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def figures(results: Results) -> dict[str, str]:
    """Ceilings, settings and summary as text."""
    found = {}
    if results.ceilings:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in results.ceilings.products.items())
        found["ceilings"] = f"{rates} GFLOP/s; reading {results.ceilings.read_gb_s:.1f} GB/s"
    for name, about in results.about.items():
        found[name] = ", ".join(
            f"{key} {value}" for key, value in about.items() if value is not None
        )
    found["summary"] = f"`{report.json_line(results.summary)}`"
    return found


def as_json(results: Results) -> dict[str, object]:
    """Everything, for programs."""
    runs = {
        case: {
            program: [
                {"output_tok_s": run.output_tok_s, "first_ms": run.first_ms, "step_ms": run.step_ms}
                for run in rounds
            ]
            for program, rounds in found.items()
        }
        for case, found in results.runs.items()
    }
    return {
        "machine": dict(results.machine),
        "ceilings": asdict(results.ceilings) if results.ceilings else None,
        "about": {name: dict(about) for name, about in results.about.items()},
        "runs": runs,
        "skipped": results.skipped,
        "summary": results.summary,
    }


def draw(results: Results, path: Path) -> None:
    """Draws throughput by case, a bar for each program, with the range of the rounds."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rates, programs = results.rates, results.programs
    figure, axes = plt.subplots(figsize=(max(7.0, 1.1 * len(rates)), 3.6), layout="constrained")
    width = 0.8 / len(programs)
    for i, program in enumerate(programs):
        at = [j for j, case in enumerate(rates) if program in rates[case]]
        spreads = [Spread.of(rates[case][program]) for case in rates if program in rates[case]]
        heights = [spread.median for spread in spreads]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        places = [j + (i - (len(programs) - 1) / 2) * width for j in at]
        axes.bar(places, heights, width, yerr=[below, above], label=program, ecolor="#4a5568")
    axes.set_xticks(range(len(rates)), list(rates), rotation=30, ha="right")
    axes.set(yscale="log", ylabel="output tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(programs))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _row(results: Results, case: str, peers: Sequence[str]) -> list[str]:
    rates = results.rates
    found = rates[case]
    cells = [
        f"{Spread.of(found[name]).median:.0f}" if name in found else "-"
        for name in results.programs
    ]
    for peer in peers:
        cells.append(str(over(found[OURS], found[peer])) if {OURS, peer} <= found.keys() else "-")
    best = str(over_best(rates, case)) if peers_of(rates, case) else "-"
    return [case, *cells, best]


def _times(results: Results, case: str) -> list[str]:
    cells = []
    for name in results.programs:
        runs = results.runs[case].get(name, [])
        step = Spread.of([run.step_ms for run in runs]).median
        first = Spread.of([run.first_ms for run in runs]).median
        cells.append(" / ".join("-" if v != v else f"{v:.1f}" for v in (step, first)))
    return [case, *cells]
