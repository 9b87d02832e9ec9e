"""`loraplex-server support-matrix` and `import-adapterhub`: commands on adapter formats."""

from __future__ import annotations

from pathlib import Path

import typer
from loraplex_adapters.convert.importers import adapterhub
from loraplex_adapters.format import matrix
from loraplex_model.base.refusal import Refusal


def support_matrix() -> None:
    """Print the supported kinds of adapters and their supported options as Markdown."""
    typer.echo(matrix.markdown())


def import_adapterhub(source: Path, target: Path) -> None:
    """Convert the AdapterHub adapter SOURCE into the new directory TARGET, if that is exact."""
    try:
        adapterhub.convert(source, target)
    except Refusal as refusal:
        for problem in refusal.problems:
            typer.echo(f"error: {problem.reason}: {problem.message}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"converted to {target}; registration will check it against the base model")


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("support-matrix")(support_matrix)
    app.command("import-adapterhub")(import_adapterhub)
