"""`loraplex pull`: fetches an adapter into a local folder. It needs no server."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli import output
from loraplex.cli.options import Json, option
from loraplex.cli.session import ExitStatus
from loraplex.sources import AdapterAddress, AddressInvalid, AllowList, PullFailed
from loraplex.sources import pull as fetch
from loraplex.sources.fetching import MAX_BYTES

_FOLDER = "Folder"
_SOURCE = "Source"


def pull(
    address: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="hf://ORG/NAME (then @REVISION, :SUBFOLDER), s3://BUCKET/PREFIX, "
            "gs://BUCKET/PREFIX or file:///PATH.",
        ),
    ],
    into: Annotated[
        Path,
        option(_FOLDER, "Folder in which the adapter's folder is made.", metavar="DIR"),
    ],
    name: Annotated[
        str,
        option(_FOLDER, "Name of the adapter's folder. Default: from the URI.", metavar="NAME"),
    ] = "",
    replace: Annotated[
        bool, option(_FOLDER, "Replace a folder that has other files.", "--replace")
    ] = False,
    max_bytes: Annotated[
        int, option(_SOURCE, "Most bytes of the weights.", min=1, metavar="BYTES")
    ] = MAX_BYTES,
    allow: Annotated[
        list[str] | None,
        option(
            _SOURCE,
            "Fetch only what begins with this. Can be repeated. Default: anything.",
            metavar="PREFIX",
            envvar="LORAPLEX_PULL_ALLOW",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch an adapter into a local folder, for a server's import root or watched directory.

    The folder appears once it is complete. Only the adapter's configuration, weights, chat template
    and signature are fetched. Credentials come from the environment (HF_TOKEN, AWS_..., ...).
    """
    try:
        found = AdapterAddress.parse(address)
        if allow is not None and found not in AllowList(allow):
            raise AddressInvalid(f"it does not begin with an allowed prefix: {AllowList(allow)}")
        folder = _folder(name or found.last)
    except AddressInvalid as error:
        _complain(f"{address}: {error}")
        raise typer.Exit(ExitStatus.USAGE) from None
    try:
        done = fetch(found, into, folder, max_bytes=max_bytes, replace=replace)
    except PullFailed as error:
        _complain(str(error))
        raise typer.Exit(ExitStatus.REFUSED) from None
    if as_json:
        output.write_json({**dataclasses.asdict(done), "folder": str(done.folder)})
    else:
        state = "" if done.changed else " (no change)"
        print(f"{done.folder} {done.digest}{state}")


def _folder(name: str) -> str:
    """The name of the folder to make. Raises AddressInvalid."""
    if name != Path(name).name or name.startswith(".") or not name.isprintable():
        raise AddressInvalid(f"{name!r} is not the name of a folder; give one with --name")
    return name


def _complain(text: str) -> None:
    print(f"loraplex: {' '.join(text.split())}", file=sys.stderr)
