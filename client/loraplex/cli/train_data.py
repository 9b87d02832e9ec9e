"""`loraplex train data`: files of examples on the server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli import options, output
from loraplex.cli.command import command
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.jobs.data import DataFile

app = typer.Typer(name="data", help="Store files of examples on the server.", no_args_is_help=True)

DataId = Annotated[
    str, typer.Argument(metavar="ID", help="File id, as printed by `loraplex train data upload`.")
]


@command(app, "upload", timeout=None)
def upload(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Local file.", exists=True)],
    label: options.Labels = None,
    request_id: Annotated[
        str, option("Data", "Id that makes repeated uploads store only one file.", metavar="ID")
    ] = "",
) -> None:
    """Store a file of examples for `loraplex train create NAME ID --uploaded`."""
    labels = options.parse_pairs(label)
    stored = session.client.training.upload_data(file, labels=labels, request_id=request_id)
    session.show(stored, lambda made: print(made.data_id))


@command(app, "list")
def list_(session: Session) -> None:
    """List the stored files, the newest first."""
    found = session.client.training.list_data()
    if found or session.as_json:
        session.show(found, _write_files)
    else:
        output.note("no files of examples; store one with: loraplex train data upload FILE")


@command(app, "get")
def get(session: Session, data_id: DataId) -> None:
    """Describe one file."""
    session.show(session.client.training.get_data(data_id), output.write_fields)


@command(app, "read", json=False, timeout=None)
def read(session: Session, data_id: DataId) -> None:
    """Write a file's bytes to standard output."""
    with session.client.training.read_data(data_id) as pieces:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@command(app, "delete", json=False)
def delete(
    session: Session,
    data_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Files to delete.")],
) -> None:
    """Delete files. Jobs that were created with them keep their copy."""
    for data_id in data_ids:
        session.client.training.delete_data(data_id)
        print(f"{data_id} deleted")


def _write_files(files: Sequence[DataFile]) -> None:
    """Prints a table on a terminal; elsewhere tab-separated lines."""
    titles = ("file", "name", "bytes", "created")
    rows = [
        (
            *(file.data_id, file.filename, file.size_bytes),
            file.create_time.isoformat(timespec="seconds") if file.create_time else "-",
        )
        for file in files
    ]
    output.write_table(titles, rows, numbers=("bytes",))
