"""`loraplex adapters`: what is registered, under which names, and where it is."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex import channel
from loraplex.cli import options, output, residency, uploads
from loraplex.cli.session import session

app = typer.Typer(name="adapters", help="Register, load and remove adapters.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The registered name.")]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="A second, movable name.")]


@app.command("register")
def register(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")
    ],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="PEFT directory below the server's import root.")
    ],
    replace: options.Replace = False,
    load: options.LoadNow = False,
    label: options.Labels = None,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Copy an adapter into the server's store under NAME."""
    labels = options.parse_labels(label or ())
    with session(ctx, server, timeout) as client:
        done = client.register_adapter(name, path, replace=replace, load=load, labels=labels)
    output.write_registration(done, as_json)


app.command("upload")(uploads.upload)
app.command("validate")(uploads.validate)


@app.command("list")
def list_(
    ctx: typer.Context,
    label: options.Labels = None,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """List the registered adapters, or those that have all the given labels."""
    labels = options.parse_labels(label or ())
    with session(ctx, server, timeout) as client:
        found = client.list_adapters(labels=labels)
    if as_json:
        output.write_json(found)
    elif found:
        output.write_adapters(found)
    elif labels:
        output.note("no adapter has these labels")
    else:
        output.note("no adapters; add one with: loraplex adapters register NAME PATH")


@app.command("get")
def get(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
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


@app.command("versions")
def versions(
    ctx: typer.Context,
    name: Name,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """List all versions of NAME, the newest first."""
    with session(ctx, server, timeout) as client:
        found = client.list_versions(name)
    if as_json:
        output.write_json(found)
    else:
        output.write_adapters(found)


@app.command("label")
def label(
    ctx: typer.Context,
    adapter_id: options.AdapterId,
    label: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Labels to put on it.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A label to take off; repeat it.")
    ] = None,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Change the labels of one version."""
    labels = options.parse_labels(label or ())
    with session(ctx, server, timeout) as client:
        found = client.label_adapter(adapter_id, labels, remove=remove or ())
    if as_json:
        output.write_json(found)
    else:
        print(output.identity(found), output.labels(found.labels) or "no labels")


@app.command("alias")
def alias(
    ctx: typer.Context,
    alias: Alias,
    adapter_id: options.AdapterId,
    expected: Annotated[
        str | None,
        typer.Option(
            "--expected",
            metavar="ID",
            help='Only if it points there until now; "" if it must be new.',
        ),
    ] = None,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Point ALIAS to the version that ID names now."""
    with session(ctx, server, timeout) as client:
        found = client.set_alias(alias, adapter_id, expected=expected)
    if as_json:
        output.write_json(found)
    else:
        print(f"{alias} -> {output.identity(found)}")


@app.command("unalias")
def unalias(
    ctx: typer.Context,
    alias: Alias,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Remove ALIAS; what it points to stays."""
    with session(ctx, server, timeout) as client:
        client.delete_alias(alias)
    print(f"{alias} removed")


app.command("load")(residency.load)
app.command("unload")(residency.unload)
app.command("pin")(residency.pin)
app.command("unpin")(residency.unpin)
app.command("merge")(residency.merge)
app.command("unmerge")(residency.unmerge)
app.command("watch")(residency.watch)


@app.command("delete")
def delete(
    ctx: typer.Context,
    name: Name,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Forget NAME. `restore` brings it back until the operator collects garbage."""
    with session(ctx, server, timeout) as client:
        client.delete_adapter(name)
    print(f"{name} deleted")


@app.command("restore")
def restore(
    ctx: typer.Context,
    name: Name,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Bring a deleted NAME back, with its versions."""
    with session(ctx, server, timeout) as client:
        output.write_moved(client.restore_adapter(name), as_json)
