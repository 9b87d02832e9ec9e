"""`loraplex adapters upload`, `validate` and `uploads`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from loraplex import uploads
from loraplex.cli import options, output
from loraplex.cli.command import command
from loraplex.cli.options import option
from loraplex.cli.session import ExitStatus, Session
from loraplex.client import Client
from loraplex.errors import (
    AdapterRejected,
    Cancelled,
    DeadlineExceeded,
    LoraplexError,
    Unauthenticated,
    Unavailable,
)
from loraplex.results import Finding, Validation

app = typer.Typer(name="uploads", help="List and abort unfinished uploads.", no_args_is_help=True)


@command(app, "list")
def list_(session: Session) -> None:
    """List the unfinished uploads of all clients, the one that expires first at the front."""
    found = session.client.list_uploads()
    if found or session.as_json:
        session.show(found, output.write_uploads)
    else:
        output.note("no unfinished uploads")


@command(app, "abort", json=False)
def abort(
    session: Session,
    upload_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Uploads to drop.")],
) -> None:
    """Drop unfinished uploads and their bytes."""
    for upload_id in upload_ids:
        session.client.abort_upload(upload_id)
        print(f"{upload_id} aborted")


def upload(
    session: Session,
    name: options.NewName,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Local PEFT directory.", exists=True)
    ],
    replace: options.Replace = False,
    load: options.LoadNow = False,
    label: options.Labels = None,
    chat_template: options.ChatTemplate = None,
    eos_token_id: options.EosTokenIds = None,
    signature: options.Signature = None,
    resume: Annotated[
        str, option("Registration", "Resume the interrupted upload ID.", metavar="ID")
    ] = "",
) -> None:
    """Upload an adapter to the server and register it as NAME."""
    labels = options.parse_pairs(label)
    client = session.client
    uploads.require_adapter(folder)  # a wrong folder starts no upload
    upload_id = resume or client.start_upload()
    with _kept(client, upload_id, dropped=not resume), output.progress() as show:
        done = client.upload_adapter(
            *(name, folder),
            replace=replace,
            load=load,
            labels=labels,
            chat_template=options.read_template(chat_template),
            eos_token_ids=eos_token_id or (),
            signature=options.read_signature(signature),
            upload_id=upload_id,
            progress=show,
        )
    session.show(done, output.write_registration)


def validate(
    session: Session,
    path: options.ServerPath,
    local: Annotated[
        bool, option("Adapter", "PATH is a local directory; upload it for the check.", "--local")
    ] = False,
) -> None:
    """Report everything that is wrong with an adapter, without registering it.

    Exits with 6 if the server would refuse the adapter.
    """
    client = session.client
    found = _validate_local(client, path) if local else client.validate_adapter(path)
    session.show(found, output.write_validation)
    if not found.valid:
        raise typer.Exit(ExitStatus.REFUSED)


def _validate_local(client: Client, path: str) -> Validation:
    try:
        files = uploads.Files.read(path)  # a wrong path starts no upload
    except AdapterRejected as error:
        (violation,) = error.violations
        finding = Finding(error.reason, violation.field, violation.description)
        return Validation((finding,), None)
    upload_id = client.start_upload()
    try:
        with output.progress() as show:
            client.stage_adapter(path, upload_id=upload_id, progress=show)
        return client.validate_adapter(upload_id=upload_id, other_files=files.others)
    finally:
        with contextlib.suppress(LoraplexError):
            client.abort_upload(upload_id)


@contextlib.contextmanager
def _kept(client: Client, upload_id: str, dropped: bool) -> Iterator[None]:
    """Prints how to resume an interrupted upload; aborts one that was refused if `dropped`."""
    try:
        yield
    except (KeyboardInterrupt, Unavailable, Unauthenticated, DeadlineExceeded, Cancelled):
        output.remark(f"the uploaded part is kept; resume with --resume {upload_id}")
        raise
    except LoraplexError:
        if dropped:
            with contextlib.suppress(LoraplexError):
                client.abort_upload(upload_id)
        raise
