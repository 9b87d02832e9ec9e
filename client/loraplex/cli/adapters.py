"""`loraplex adapters`: the registered adapters, their names and where they are."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplex.cli import options, output, residency, uploads
from loraplex.cli.command import command
from loraplex.cli.options import option
from loraplex.cli.session import Session

app = typer.Typer(name="adapters", help="Register, load and remove adapters.", no_args_is_help=True)

_REGISTRATION = "Registration"
_NAMES = "Names, aliases and labels"
_DEVICE = "Device"

Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered name.")]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Alias: a name that can be moved.")]


@app.command("register", rich_help_panel=_REGISTRATION)
@command()
def register(
    session: Session,
    name: options.NewName,
    path: options.ServerPath,
    replace: options.Replace = False,
    load: options.LoadNow = False,
    label: options.Labels = None,
) -> None:
    """Copy an adapter from the server's import root into its store and register it as NAME."""
    labels = options.parse_pairs(label)
    done = session.client.register_adapter(name, path, replace=replace, load=load, labels=labels)
    session.show(done, output.write_registration)


app.command("upload", rich_help_panel=_REGISTRATION)(uploads.upload)
app.command("validate", rich_help_panel=_REGISTRATION)(uploads.validate)


@app.command("delete", rich_help_panel=_REGISTRATION)
@command(json=False)
def delete(session: Session, name: Name) -> None:
    """Delete NAME. `restore` can bring it back until the operator collects garbage."""
    session.client.delete_adapter(name)
    print(f"{name} deleted")


@app.command("restore", rich_help_panel=_REGISTRATION)
@command()
def restore(session: Session, name: Name) -> None:
    """Restore a deleted NAME with all its versions."""
    session.show(session.client.restore_adapter(name), output.write_residency)


@app.command("list", rich_help_panel=_NAMES)
@command()
def list_(
    session: Session,
    label: Annotated[
        list[str] | None,
        option(
            "Filter",
            "List only adapters that have this label. Can be repeated.",
            "--label",
            metavar="KEY=VALUE",
        ),
    ] = None,
) -> None:
    """List the registered adapters."""
    found = session.client.list_adapters(labels=options.parse_pairs(label))
    if found or session.as_json:
        session.show(found, output.write_adapters)
    elif label:
        output.note("no adapter has these labels")
    else:
        output.note("no adapters; register one with: loraplex adapters register NAME PATH")


@app.command("get", rich_help_panel=_NAMES)
@command()
def get(session: Session, adapter_id: options.AdapterId) -> None:
    """Describe one adapter."""
    session.show(session.client.get_adapter(adapter_id), output.write_fields)


@app.command("versions", rich_help_panel=_NAMES)
@command()
def versions(session: Session, name: Name) -> None:
    """List all versions of NAME, the newest first."""
    session.show(session.client.list_versions(name), output.write_adapters)


@app.command("label", rich_help_panel=_NAMES)
@command()
def label(
    session: Session,
    adapter_id: options.AdapterId,
    label: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Labels to set.")
    ] = None,
    remove: Annotated[
        list[str] | None, option("Labels", "Remove the label KEY. Can be repeated.", metavar="KEY")
    ] = None,
) -> None:
    """Set or remove labels of one version."""
    labels = options.parse_pairs(label)
    found = session.client.label_adapter(adapter_id, labels, remove=remove or ())
    session.show(found, output.write_labels)


@app.command("alias", rich_help_panel=_NAMES)
@command()
def alias(
    session: Session,
    alias: Alias,
    adapter_id: options.AdapterId,
    expected: Annotated[
        str | None,
        option(
            "Alias",
            'Move the alias only if it points to ID now; "" if it must not exist yet.',
            "--expected",
            metavar="ID",
        ),
    ] = None,
) -> None:
    """Point ALIAS to the version that ID currently names."""
    found = session.client.set_alias(alias, adapter_id, expected=expected)
    session.show(found, lambda adapter: print(f"{alias} -> {output.identity(adapter)}"))


@app.command("unalias", rich_help_panel=_NAMES)
@command(json=False)
def unalias(session: Session, alias: Alias) -> None:
    """Delete ALIAS; its adapter stays."""
    session.client.delete_alias(alias)
    print(f"{alias} removed")


app.command("load", rich_help_panel=_DEVICE)(residency.load)
app.command("unload", rich_help_panel=_DEVICE)(residency.unload)
app.command("pin", rich_help_panel=_DEVICE)(residency.pin)
app.command("unpin", rich_help_panel=_DEVICE)(residency.unpin)
app.command("merge", rich_help_panel=_DEVICE)(residency.merge)
app.command("unmerge", rich_help_panel=_DEVICE)(residency.unmerge)
app.command("watch", rich_help_panel=_DEVICE)(residency.watch)
