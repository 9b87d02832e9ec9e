"""Displays examples as the model sees them: tokens with their loss mask, and the counts."""

from __future__ import annotations

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
    """Renders the counts as a table, and the notes."""
    table = Table(title="data", title_justify="left")
    table.add_column("")
    for side in ("training", "evaluation"):
        table.add_column(side, justify="right")
    rows = {
        "examples": "examples",
        "tokens": "tokens",
        "learned": "learned tokens",
        "longest": "longest, in tokens",
        "truncated": "truncated examples",
        "cut": "tokens cut",
    }
    for name, words in rows.items():
        sides = (report.train, report.evaluation)
        table.add_row(words, *(f"{getattr(counts, name):,}" for counts in sides))
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in sorted(report.shapes.items()))
    lines = Text(f"lines: {shapes}; dropped: {len(report.dropped):,}")
    if len(report.files) > 1 or any(file.kind != "JSONL" for file in report.files):
        files = [Text(_file(file, report)) for file in report.files]
    else:
        files = []
    return Group(table, lines, *files, *(Text(f"note: {note}") for note in report.notes()))


def _file(file: FileCounts, report: DataReport) -> str:
    """Returns the line of one file."""
    whole = sum(one.taken for one in report.files)
    share = f", {file.taken / whole:.1%} of an epoch" if file.taken else ""
    return f"file: {_visible(file.path)}: {file.kind}, {file.examples:,} examples{share}"


def _visible(piece: str) -> str:
    """Escapes characters that move the cursor or control the terminal."""
    shown = piece.replace("\n", "⏎").replace("\t", "→")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
