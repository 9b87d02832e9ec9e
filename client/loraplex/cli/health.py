"""`loraplex health`: reports whether the server is serving, for scripts and container checks."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex.cli import output
from loraplex.cli.options import option
from loraplex.cli.session import ExitStatus, Session
from loraplex.results import HealthStatus


def health(
    session: Session,
    service: Annotated[
        str, option("Server", "Check one service, such as loraplex.v1.GenerationService.")
    ] = "",
) -> None:
    """Check the server. Exits with 0 if it is serving, with 4 if it is not."""
    status = session.client.health(service, timeout=session.timeout)
    if session.as_json:
        output.write_json({"status": status})
    else:
        print(status)
    if status is not HealthStatus.SERVING:
        raise typer.Exit(ExitStatus.UNAVAILABLE)
