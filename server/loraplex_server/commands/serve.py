"""The command `serve`, which starts the engine before it imports what the front process needs."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated

import typer

from loraplex_server import logs
from loraplex_server.commands.flags import ALL_SETTINGS, with_settings
from loraplex_server.config import Config
from loraplex_server.declared.named import FLAG, parse_modules, require_different
from loraplex_server.engine.process.child import SpawnedEngine, spawn
from loraplex_server.exits import ServerExit
from loraplex_server.runtime.privacy import exposures, keep_private
from loraplex_server.settings import PANELS

HELP = "Serve one NF4 base model and many LoRA adapters over gRPC."

log = logging.getLogger(__name__)


def serve(
    config: Config,
    *,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            FLAG,
            metavar="MODULE",
            help="Adapter that is registered at start, as NAME=PATH or as JSON with name and path; "
            "several may follow. A TOML file has tables [[adapters]] for it.",
            rich_help_panel=PANELS["max_rank"],
        ),
    ] = None,
    enable_lora: Annotated[
        bool, typer.Option("--enable-lora", hidden=True, help="No effect: they always are.")
    ] = False,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", min=1, max=4096, hidden=True)
    ] = None,
    max_loras: Annotated[str | None, typer.Option("--max-loras", hidden=True)] = None,
    max_cpu_loras: Annotated[str | None, typer.Option("--max-cpu-loras", hidden=True)] = None,
) -> None:
    """Load the base model and serve until SIGTERM."""
    _refuse_counts({"--max-loras": max_loras, "--max-cpu-loras": max_cpu_loras})
    config = _with_modules(config, lora_modules or ())
    if max_lora_rank is not None:
        config = config.model_copy(update={"max_rank": max_lora_rank})
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


def _with_modules(config: Config, texts: Sequence[str]) -> Config:
    """The settings with the adapters of the command line. Ends the command if one is malformed."""
    try:
        adapters = (*config.adapters, *parse_modules(texts))
        require_different(adapters)
    except ValueError as error:
        typer.echo(f"error: {FLAG}: {error}", err=True)
        raise typer.Exit(ServerExit.BAD_CONFIG) from None
    return config.model_copy(update={"adapters": adapters})


def _refuse_counts(given: Mapping[str, str | None]) -> None:
    """Ends the command for a flag of other servers that counts what this one measures in bytes."""
    instead = {"--max-loras": "--adapter-memory", "--max-cpu-loras": "--host-adapter-memory"}
    for flag in (flag for flag, value in given.items() if value is not None):
        text = f"adapters are bounded by their bytes, not by their number; use {instead[flag]}"
        typer.echo(f"error: {flag}: {text}", err=True)
        raise typer.Exit(ServerExit.BAD_CONFIG)


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
