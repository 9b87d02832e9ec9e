"""`loraplex adapters`: the registered adapters, their names and where they are."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loraplex.cli import options, output, uploads
from loraplex.cli.command import command
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.results import AdapterTable

app = typer.Typer(name="adapters", help="Register, load and remove adapters.", no_args_is_help=True)

_REGISTRATION = "Registration"
_NAMES = "Names, aliases and labels"
_DEVICE = "Device"

Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered name.")]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Alias: a name that can be moved.")]


@command(app, "register", _REGISTRATION)
def register(
    session: Session,
    name: options.NewName,
    path: options.ServerPath,
    replace: options.Replace = False,
    load: options.LoadNow = False,
    label: options.Labels = None,
    chat_template: options.ChatTemplate = None,
    eos_token_id: options.EosTokenIds = None,
    signature: options.Signature = None,
) -> None:
    """Copy an adapter from the server's import root into its store and register it as NAME."""
    labels = options.parse_pairs(label)
    done = session.client.register_adapter(
        *(name, path),
        replace=replace,
        load=load,
        labels=labels,
        chat_template=options.read_template(chat_template),
        eos_token_ids=eos_token_id or (),
        signature=options.read_signature(signature),
    )
    session.show(done, output.write_registration)


command(app, "upload", _REGISTRATION)(uploads.upload)
command(app, "validate", _REGISTRATION)(uploads.validate)
app.add_typer(uploads.app, rich_help_panel=_REGISTRATION)


@command(app, "delete", _REGISTRATION, json=False)
def delete(session: Session, name: Name) -> None:
    """Delete NAME. `restore` can bring it back until the operator collects garbage."""
    session.client.delete_adapter(name)
    print(f"{name} deleted")


@command(app, "restore", _REGISTRATION)
def restore(session: Session, name: Name) -> None:
    """Restore a deleted NAME with all its versions."""
    session.show(session.client.restore_adapter(name), output.write_residency)


@command(app, "list", _NAMES)
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


@command(app, "get", _NAMES)
def get(session: Session, adapter_id: options.AdapterId) -> None:
    """Describe one adapter."""
    session.show(session.client.get_adapter(adapter_id), output.write_fields)


@command(app, "versions", _NAMES)
def versions(session: Session, name: Name) -> None:
    """List all versions of NAME, the newest first."""
    session.show(session.client.list_versions(name), output.write_adapters)


@command(app, "label", _NAMES)
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


@command(app, "alias", _NAMES)
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


@command(app, "unalias", _NAMES, json=False)
def unalias(session: Session, alias: Alias) -> None:
    """Delete ALIAS; its adapter stays."""
    session.client.delete_alias(alias)
    print(f"{alias} removed")


@command(app, "load", _DEVICE)
def load(session: Session, adapter_id: options.AdapterId) -> None:
    """Load an adapter onto the device and wait until it is resident."""
    session.show(session.client.load_adapter(adapter_id), output.write_residency)


@command(app, "unload", _DEVICE)
def unload(
    session: Session,
    adapter_id: options.AdapterId,
    force: Annotated[
        bool, option("Running requests", "Abort the requests that use the adapter.", "--force")
    ] = False,
    drain: Annotated[
        float | None,
        option(
            "Running requests",
            "Abort the requests that still run after this time.",
            min=0,
            metavar="SECONDS",
        ),
    ] = None,
) -> None:
    """Remove an adapter from the device once its running requests have finished."""
    found = session.client.unload_adapter(adapter_id, force=force, drain=drain)
    session.show(found, output.write_residency)


@command(app, "pin", _DEVICE)
def pin(session: Session, adapter_id: options.AdapterId) -> None:
    """Load an adapter onto the device and keep it there."""
    session.show(session.client.pin_adapter(adapter_id), output.write_residency)


@command(app, "unpin", _DEVICE)
def unpin(session: Session, adapter_id: options.AdapterId) -> None:
    """Allow a pinned adapter to be evicted again."""
    session.show(session.client.unpin_adapter(adapter_id), output.write_residency)


@command(app, "merge", _DEVICE)
def merge(session: Session, adapter_id: options.AdapterId) -> None:
    """Compute an adapter's requests with dense merged weights; other requests are unaffected."""
    session.show(session.client.merge_adapter(adapter_id), output.write_residency)


@command(app, "unmerge", _DEVICE)
def unmerge(session: Session, adapter_id: options.AdapterId) -> None:
    """Drop an adapter's merged weights."""
    session.show(session.client.unmerge_adapter(adapter_id), output.write_residency)


@command(app, "watch", _DEVICE, timeout=None)
def watch(session: Session) -> None:
    """Print the adapters, then one line for every change, until Ctrl-C."""
    with session.client.watch_adapters() as changes:
        for item in changes:
            if session.as_json:
                kind = "table" if isinstance(item, AdapterTable) else "event"
                output.write_json({kind: item}, flush=True)
            elif isinstance(item, AdapterTable):
                if item.resync:
                    output.note("some changes were missed; this is the current table")
                output.write_adapters(item.adapters)
                sys.stdout.flush()
            else:
                output.write_event(item)
