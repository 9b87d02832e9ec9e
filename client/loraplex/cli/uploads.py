"""`loraplex adapters upload` and `validate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from loraplex import channel, uploads
from loraplex.cli import options, output
from loraplex.cli.session import ExitCode, session
from loraplex.client import Client
from loraplex.errors import Cancelled, DeadlineExceeded, LoraplexError, Unavailable

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A PEFT directory of this machine.", exists=True)
]


def upload(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")
    ],
    folder: Folder,
    replace: options.Replace = False,
    load: options.LoadNow = False,
    label: options.Labels = None,
    resume: Annotated[
        str, typer.Option(metavar="ID", help="Go on with an upload that was interrupted.")
    ] = "",
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Send an adapter to the server and register it under NAME."""
    labels = options.parse_labels(label or ())
    with session(ctx, server, timeout) as client:
        upload_id = resume or client.start_upload()
        with _kept(client, upload_id, dropped=not resume), output.progress() as show:
            done = client.upload_adapter(
                *(name, folder),
                replace=replace,
                load=load,
                labels=labels,
                upload_id=upload_id,
                progress=show,
            )
    output.write_registration(done, as_json)


def validate(
    ctx: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="PEFT directory below the server's import root.")
    ],
    local: Annotated[
        bool, typer.Option("--local", help="PATH is on this machine; send it for the check only.")
    ] = False,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Say everything that is wrong with an adapter; register nothing. Exits with 6 if refused."""
    with session(ctx, server, timeout) as client:
        if local:
            uploads.Files.read(path)  # a wrong path opens no upload
            upload_id = client.start_upload()
            try:
                with output.progress() as show:
                    client.stage_adapter(path, upload_id=upload_id, progress=show)
                found = client.validate_adapter(upload_id=upload_id)
            finally:
                with contextlib.suppress(LoraplexError):
                    client.abort_upload(upload_id)
        else:
            found = client.validate_adapter(path)
    output.write_validation(found, as_json)
    if not found.valid:
        raise typer.Exit(ExitCode.REFUSED)


@contextlib.contextmanager
def _kept(client: Client, upload_id: str, dropped: bool) -> Iterator[None]:
    """What was interrupted can go on, and is told how; what was refused is dropped."""
    try:
        yield
    except (KeyboardInterrupt, Unavailable, DeadlineExceeded, Cancelled):
        output.remark(f"what has arrived is kept; go on with --resume {upload_id}")
        raise
    except LoraplexError:
        if dropped:
            with contextlib.suppress(LoraplexError):
                client.abort_upload(upload_id)
        raise
