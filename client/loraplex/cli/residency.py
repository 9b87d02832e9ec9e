"""`loraplex adapters load`, `unload`, `pin`, `merge`, `watch`: where an adapter is."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loraplex import channel
from loraplex.cli import options, output
from loraplex.cli.session import session
from loraplex.results import AdapterTable


def load(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Put an adapter on the device, and wait until it is there."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.load_adapter(adapter_id), as_json)


def unload(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    force: Annotated[bool, typer.Option("--force", help="Abort the requests that use it.")] = False,
    drain: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Abort those that run longer than this."),
    ] = None,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Take an adapter off the device, once the requests that use it have finished."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.unload_adapter(adapter_id, force=force, drain=drain), as_json)


def pin(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Put an adapter on the device and keep it there."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.pin_adapter(adapter_id), as_json)


def unpin(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Let a pinned adapter make room for others again."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.unpin_adapter(adapter_id), as_json)


def merge(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Compute an adapter's requests with dense weights; no others are touched."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.merge_adapter(adapter_id), as_json)


def unmerge(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Drop an adapter's dense weights."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.unmerge_adapter(adapter_id), as_json)


def watch(
    ctx: typer.Context,
    as_json: options.Json = False,
    server: options.Server = None,
) -> None:
    """Print the adapters, then every change, a line each, until Ctrl-C."""
    with (
        session(ctx, server, channel.DEFAULT_TIMEOUT) as client,
        client.watch_adapters() as news,
    ):
        for item in news:
            if as_json:
                kind = "table" if isinstance(item, AdapterTable) else "event"
                output.write_json({kind: item}, flush=True)
            elif isinstance(item, AdapterTable):
                if item.resync:
                    output.note("changes came too fast; this is the table again")
                output.write_adapters(item.adapters)
                sys.stdout.flush()
            else:
                output.write_event(item)
