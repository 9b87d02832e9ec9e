"""`loraplex embed`: texts as vectors."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from loraplex.cli import options, output
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.cli.terminal import recovered
from loraplex.views.embedding import Embeddings


def embed(
    session: Session,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts; `-` reads standard input, a text on each line."
        ),
    ] = None,
    *,
    adapter: options.Adapter = None,
    pooling: Annotated[
        str,
        option(
            "Model",
            "What a text's vector is made of: `last`, the state of its last token, or `mean`, the "
            "mean over all tokens.",
            metavar="last|mean",
        ),
    ] = "last",
    raw_length: Annotated[
        bool, option("Model", "Do not scale the vectors to length 1.", "--raw-length")
    ] = False,
) -> None:
    """Print the last hidden state of texts: a line of numbers for each."""
    given = texts or ["-"]
    if given == ["-"]:
        given = recovered(sys.stdin.read()).splitlines()
    if not given:
        raise typer.BadParameter("there is no text on standard input")
    chosen: Any = pooling
    found = session.client.embed(given, adapter=adapter, pooling=chosen, raw_length=raw_length)
    session.show(found, _write)


def _write(found: Embeddings) -> None:
    for vector in found.vectors:
        print(*(f"{value:.9g}" for value in vector.values))
    if sys.stderr.isatty():
        model = " + ".join(f"{each.name}@{each.version}" for each in found.adapters)
        tokens = sum(vector.tokens for vector in found.vectors)
        output.note(f"[{model or 'base model'}, {tokens} tokens]")
