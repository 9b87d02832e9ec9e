"""`loraplex-server sign`: signs an adapter's files with a private key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer
from loraplex_adapters.signing import sign
from loraplex_adapters.store.index.ids import check_name
from loraplex_model.base.refusal import Refusal

from loraplex_server.commands.store_cli import fail

_DEFAULT: Final = "model.sig"
_PASSWORD: Final = "LORAPLEX_SIGNING_PASSWORD"  # noqa: S105  (the name of a variable)


def sign_adapter(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory with the adapter's two files.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name that it will be registered under.")],
    key: Annotated[
        Path,
        typer.Option(
            "--key",
            metavar="FILE",
            help="Private key in PEM, of the curve P-256, P-384 or P-521. The variable "
            f"{_PASSWORD} holds its password, if it has one.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help=f"File to write (default: DIR/{_DEFAULT})."),
    ] = None,
) -> None:
    """Sign an adapter, for servers whose policy of signatures knows the key.

    The file has the form of model-signing 1.0, which can check it too.
    """
    target = out or directory / _DEFAULT
    try:
        check_name(name)
        password = os.environ.get(_PASSWORD, "").encode() or None
        signature = sign(directory, name, key.read_bytes(), password)
        target.write_bytes(signature)
    except Refusal as refusal:
        fail(refusal)
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from None
    typer.echo(f"{target} signs {directory} as {name}")
