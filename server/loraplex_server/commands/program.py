"""All commands of `loraplex-server`: the server, and those that work without a running one."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import typer

from loraplex_server.commands import (
    doctor,
    export_cli,
    keys_cli,
    serve,
    store_cli,
    support_matrix,
)
from loraplex_server.commands.adapter_files import backup, sign
from loraplex_server.commands.flags import ALL_SETTINGS, with_settings
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit

app = typer.Typer(
    help=serve.HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def examine(
    config: Config,
    *,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="Check this adapter against the model as well; may be repeated.",
        ),
    ] = None,
) -> None:
    """Check this machine, the settings and the model; exit with 1 if the server could not serve.

    Nothing is converted, fetched or changed.
    """
    healthy = True
    for check in doctor.examine(config, adapter or ()):
        typer.echo(f"{'ok' if check.good else '!!'}  {check.subject:<12} {check.text}")
        healthy &= check.good
    raise typer.Exit(ServerExit.OK if healthy else ServerExit.REFUSED)


serve.add_to(app)
app.command("doctor")(with_settings(examine, ALL_SETTINGS))
app.command("support-matrix")(support_matrix.print_matrix)
export_cli.add_commands(app)
app.command("sign")(sign.sign_adapter)
backup.add_commands(store_cli.app)
app.add_typer(store_cli.app, name="store")
app.add_typer(keys_cli.app, name="keys")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"loraplex-server {installed('loraplex')} (Python {sys.version.split()[0]})")
