"""`loraplex adapters`: what is registered and what is on the device."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex import channel
from loraplex.cli import options, output
from loraplex.cli.session import session
from loraplex.results import AdapterInfo

app = typer.Typer(name="adapters", help="Register, load and remove adapters.", no_args_is_help=True)

AdapterId = Annotated[
    str, typer.Argument(metavar="ID", help="NAME, NAME@VERSION or NAME@sha256:HEX.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The registered name.")]


@app.command("register")
def register(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")
    ],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="PEFT directory below the server's import root.")
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Let a taken name move to these bytes.")
    ] = False,
    load: Annotated[bool, typer.Option("--load", help="Put it on the device at once.")] = False,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Copy an adapter into the server's store under NAME."""
    with session(ctx, server, timeout) as client:
        done = client.register_adapter(name, path, replace=replace, load=load)
    if as_json:
        output.write_json(done)
    else:
        print(f"{_name(done.adapter)} {'registered' if done.created else 'was registered already'}")


@app.command("list")
def list_(
    ctx: typer.Context,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """List the registered adapters."""
    with session(ctx, server, timeout) as client:
        found = client.list_adapters()
    if as_json:
        output.write_json(found)
    elif found:
        output.write_adapters(found)
    else:
        output.note("no adapters; add one with: loraplex adapters register NAME PATH")


@app.command("get")
def get(
    ctx: typer.Context,
    adapter_id: AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Describe one adapter."""
    with session(ctx, server, timeout) as client:
        found = client.get_adapter(adapter_id)
    if as_json:
        output.write_json(found)
    else:
        output.write_adapter(found)


@app.command("load")
def load(
    ctx: typer.Context,
    adapter_id: AdapterId,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Put an adapter on the device, and wait until it is there."""
    with session(ctx, server, timeout) as client:
        _moved(client.load_adapter(adapter_id), as_json)


@app.command("unload")
def unload(
    ctx: typer.Context,
    adapter_id: AdapterId,
    force: Annotated[bool, typer.Option("--force", help="Abort the requests that use it.")] = False,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Take an adapter off the device, once the requests that use it have finished."""
    with session(ctx, server, timeout) as client:
        _moved(client.unload_adapter(adapter_id, force=force), as_json)


@app.command("delete")
def delete(
    ctx: typer.Context,
    name: Name,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Forget NAME."""
    with session(ctx, server, timeout) as client:
        client.delete_adapter(name)
    print(f"{name} deleted")


def _moved(adapter: AdapterInfo, as_json: bool) -> None:
    if as_json:
        output.write_json(adapter)
    else:
        print(f"{_name(adapter)} {adapter.state}")


def _name(adapter: AdapterInfo) -> str:
    return f"{adapter.name}@{adapter.version} {adapter.digest}"
