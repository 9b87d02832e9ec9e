"""`loraplex-server support-matrix` and `import-adapterhub`: adapters' formats, without a server."""

from __future__ import annotations

from pathlib import Path

import typer
from loraplex_adapters.convert.importers import adapterhub
from loraplex_adapters.format import matrix
from loraplex_model.base.refusal import Refusal


def support_matrix() -> None:
    """Print which kinds of adapters and which of their options are served (Markdown)."""
    typer.echo(matrix.markdown())


def import_adapterhub(source: Path, target: Path) -> None:
    """Convert an AdapterHub bottleneck adapter into the new directory TARGET, if that is exact."""
    try:
        adapterhub.convert(source, target)
    except Refusal as refusal:
        for problem in refusal.problems:
            typer.echo(f"error: {problem.reason}: {problem.message}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"converted to {target}; register it to check it against a base")


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command("support-matrix")(support_matrix)
    app.command("import-adapterhub")(import_adapterhub)
