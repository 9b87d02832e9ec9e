"""Options that several commands share, as annotated types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from loraplex import channel

RootServer = Annotated[
    str | None,
    typer.Option(
        "--server",
        "-s",
        envvar="LORAPLEX_SERVER",
        metavar="HOST:PORT",
        help="The server; also taken after the command.",
        show_default=channel.DEFAULT_TARGET,
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        "-s",
        metavar="HOST:PORT",
        help="The server.",
        show_default=f"$LORAPLEX_SERVER, else {channel.DEFAULT_TARGET}",
    ),
]
Timeout = Annotated[
    float, typer.Option(min=0.001, metavar="SECONDS", help="Deadline of each call.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

AdapterId = Annotated[
    str, typer.Argument(metavar="ID", help="NAME, NAME@VERSION, NAME@sha256:HEX or an alias.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Let a taken name move to these bytes.")]
LoadNow = Annotated[bool, typer.Option("--load", help="Put it on the device at once.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; repeat it.")
]

Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="ID",
        help="NAME, NAME@VERSION or NAME@sha256:HEX. Default: base.",
    ),
]
Mix = Annotated[
    list[str] | None,
    typer.Option(metavar="ID=WEIGHT", help="One term of a blend of adapters; repeat it."),
]

MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Default: 256.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 is greedy. Default: 1.")
]
TopP = Annotated[float | None, typer.Option(help="Smallest set of tokens that reaches this.")]
TopK = Annotated[int | None, typer.Option(help="The k most probable tokens; 0 keeps all.")]
MinP = Annotated[float | None, typer.Option(help="At least this fraction of the most probable.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="1 is none.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Between -2 and 2.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Between -2 and 2.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same tokens. Default: random.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Ends before this text; repeat it.")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")
]


def parse_labels(terms: Iterable[str]) -> dict[str, str]:
    """`["a=x", "b="]` as `{"a": "x", "b": ""}`. Raises BadParameter."""
    labels: dict[str, str] = {}
    for term in terms:
        key, given, value = term.partition("=")
        if not key or not given or key in labels:
            raise typer.BadParameter(
                f"{term!r}: a label is KEY=VALUE, such as team=search, one for each key"
            )
        labels[key] = value
    return labels


def parse_mix(terms: Iterable[str]) -> dict[str, float | None]:
    """`["a=0.5", "b"]` as `{"a": 0.5, "b": None}`. Raises BadParameter."""
    mix: dict[str, float | None] = {}
    for term in terms:
        name, given, weight = term.partition("=")
        try:
            value = float(weight) if given else None
        except ValueError:
            value = float("nan")
        if not name or name in mix or (value is not None and value != value):
            raise typer.BadParameter(
                f"{term!r}: a term is ID=WEIGHT, such as --mix pirate=0.5, one for each ID"
            )
        mix[name] = value
    return mix
