"""The command `serve`, which starts the engine before it imports what the front process needs."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from contextlib import suppress

import typer

from loraplex_server import logs
from loraplex_server.commands.flags import ALL_SETTINGS, with_settings
from loraplex_server.config import Config
from loraplex_server.engine.process.child import SpawnedEngine, spawn
from loraplex_server.runtime.privacy import exposures, keep_private

HELP = "Serve one NF4 base model and many LoRA adapters over gRPC."

log = logging.getLogger(__name__)


def serve(config: Config) -> None:
    """Load the base model and serve until SIGTERM."""
    logs.configure(config.log_format, config.log_level)
    keep_private(config)
    for sentence in exposures(config):
        log.warning("%s", sentence)
    for number in (signal.SIGTERM, signal.SIGINT):  # until the server has handlers of its own
        signal.signal(number, lambda *_: sys.exit(0))
    engine = _start_early(config)
    try:
        # These imports and the engine's start take long, so both run at once.
        # No garbage arises from imports, and looking for it takes time.
        gc.disable()
        from loraplex_server import app as server

        gc.enable()
        code = asyncio.run(server.run(config, engine))
    finally:
        if engine is not None:
            engine.abandon()
    raise typer.Exit(code)


def _start_early(config: Config) -> SpawnedEngine | None:
    """The process of a server with one engine. None if it cannot be started.

    Then, and if the process fails, the server reports it when it starts the engine.
    """
    if not config.placements:
        with suppress(OSError):
            return spawn(config.engine_setup().command())
    return None


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("serve")(with_settings(serve, ALL_SETTINGS))


def program() -> typer.Typer:
    """A program of this command alone."""
    app = typer.Typer(help=HELP, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)  # so that the command is named on the command line
    add_to(app)
    return app
