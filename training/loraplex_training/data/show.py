"""Displays examples as the model sees them: tokens with their loss mask, and the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loraplex_training.data.dataset import Dataset
from loraplex_training.data.report import DataReport, FileCounts
from loraplex_training.data.samples import Sample
from loraplex_training.data.text import BaseText

LEARNED, SPECIAL, CUT = "black on green", "bold", "white on red"
STRIPE = ("", "underline")
"""Styles that alternate from token to token, so that their borders are visible."""
EXAMPLES: Final = 3
"""Number of dropped lines that are named for each cause."""


def show(dataset: Dataset, text: BaseText, count: int = 3) -> RenderableType:
    """Renders the first `count` training and evaluation examples and the report."""
    legend = Text.assemble(
        ("learned", LEARNED), "  given  ", ("special", SPECIAL), "  ", ("cut off here", CUT)
    )
    parts: list[RenderableType] = [legend]
    for side, samples in (("training", dataset.train), ("evaluation", dataset.evaluation)):
        parts += [example(sample, text, side) for sample in samples[:count]]
    return Group(*parts, report(dataset.report))


def example(sample: Sample, text: BaseText, side: str = "") -> Panel:
    """Renders one example with its token borders, learned tokens in colour."""
    counts = f"{len(sample.tokens)} tokens, {sum(sample.learned)} learned"
    title = f"{side} line {sample.line}: {counts}".strip()
    return Panel(mask(sample, text), title=Text(title), title_align="left")


def mask(sample: Sample, text: BaseText) -> Text:
    """Renders tokens in the style of their role, with line ends and controls made visible."""
    shown = Text()
    for i, (token, piece, learned) in enumerate(
        zip(sample.tokens, text.pieces(sample.tokens), sample.learned, strict=True)
    ):
        styles = [LEARNED if learned else "", STRIPE[i % 2]]
        if text.is_special(token):
            styles.append(SPECIAL)
            piece = piece or text.token(token)
        # A character of several tokens is shown at its last one; the others are shown as dots.
        shown.append(_visible(piece) or "·", " ".join(style for style in styles if style))
        if piece.endswith("\n"):
            shown.append("\n")
    if sample.truncated:
        shown.append(f" … {sample.truncated} tokens cut ", CUT)
    return shown


def report(report: DataReport) -> Group:
    """Renders the counts as tables, and the notes."""
    lines = Text(f"lines: {_shapes(report.shapes)}; dropped: {len(report.dropped):,}")
    parts: list[RenderableType] = [_sizes(report), lines]
    if len(report.files) > 1 or any(file.kind != "JSONL" for file in report.files):
        parts += [Text(_file(file, report)) for file in report.files]
    if report.causes:
        parts.append(_causes(report))
    parts += [Text(f"note: {note}") for note in report.notes(with_causes=False)]
    return Group(*parts)


def _sizes(report: DataReport) -> Table:
    table = Table(title="data", title_justify="left")
    table.add_column("")
    sides = (report.train, report.evaluation)
    for side in ("training", "evaluation"):
        table.add_column(side, justify="right")
    table.add_row("examples", *(f"{side.examples:,}" for side in sides))
    table.add_row("tokens", *(f"{side.tokens:,}" for side in sides))
    table.add_row("learned tokens", *(_share(side.learned, side.tokens) for side in sides))
    table.add_row("longest, in tokens", *(f"{side.longest:,}" for side in sides))
    table.add_row("truncated examples", *(_share(side.truncated, side.examples) for side in sides))
    table.add_row("tokens cut", *(_share(side.cut, side.tokens + side.cut) for side in sides))
    return table


def _file(file: FileCounts, report: DataReport) -> str:
    """Returns the line of one file."""
    whole = sum(one.taken for one in report.files)
    words = [
        f"{file.examples:,} examples",
        f"{file.taken / whole:.1%} of an epoch" if file.taken else "for evaluation",
        f"{file.tokens:,} tokens, {_share(file.learned, file.tokens)} learned",
        f"lines: {_shapes(file.shapes)}",
        *(
            f"{count:,} {what}"
            for count, what in (
                (file.dropped, "dropped"),
                (file.repeated, "repeated"),
                (file.blank, "blank"),
            )
            if count
        ),
    ]
    return f"file: {_visible(file.path)}: {file.kind}, {', '.join(words)}"


def _causes(report: DataReport) -> Table:
    table = Table(title="dropped lines", title_justify="left")
    table.add_column("lines", justify="right")
    table.add_column("each")
    table.add_column("for example")
    for cause, places in report.causes.items():
        some = "\n".join(_visible(place) for place in places[:EXAMPLES])
        table.add_row(f"{len(places):,}", Text(cause), Text(some, overflow="fold"))
    return table


def _shapes(shapes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {shape}" for shape, count in sorted(shapes.items())) or "none"


def _share(part: int, whole: int) -> str:
    """Returns a number, and its share of a whole if it has one."""
    return f"{part:,} ({part / whole:.1%})" if part else "0"


def _visible(piece: str) -> str:
    """Escapes characters that move the cursor or control the terminal."""
    shown = piece.replace("\n", "⏎").replace("\t", "→")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
