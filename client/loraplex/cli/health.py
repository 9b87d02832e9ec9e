"""`loraplex health`: is the server serving? Made for scripts and container health checks."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex import channel
from loraplex.cli import options, output
from loraplex.cli.session import ExitCode, session
from loraplex.results import HealthStatus


def health(
    ctx: typer.Context,
    service: Annotated[
        str, typer.Option(help="Ask for one service, such as loraplex.v1.GenerationService.")
    ] = "",
    as_json: options.Json = False,
    timeout: options.Timeout = channel.HEALTH_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Exit with 0 if the server is serving, with 4 if it is not."""
    with session(ctx, server, timeout) as client:
        status = client.health(service, timeout=timeout)
    if as_json:
        output.write_json({"status": status})
    else:
        print(status)
    if status is not HealthStatus.SERVING:
        raise typer.Exit(ExitCode.UNAVAILABLE)
