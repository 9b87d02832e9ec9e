"""Options that several commands share, as annotated types; grouped into panels by --help."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex import channel


def option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    """Returns a Typer option that --help shows in `panel`."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


RootServer = Annotated[
    str | None,
    option(
        "Server",
        "Address of the server. The option is also accepted after the command.",
        "--server",
        "-s",
        envvar="LORAPLEX_SERVER",
        metavar="HOST:PORT",
        show_default=channel.DEFAULT_TARGET,
    ),
]
Server = Annotated[
    str | None,
    option(
        "Server",
        "Address of the server.",
        "--server",
        "-s",
        metavar="HOST:PORT",
        show_default=f"$LORAPLEX_SERVER, else {channel.DEFAULT_TARGET}",
    ),
]
Timeout = Annotated[float, option("Server", "Deadline of each call.", min=0.001, metavar="SECONDS")]
Json = Annotated[bool, option("Output", "Print the result as JSON.", "--json")]

AdapterId = Annotated[
    str, typer.Argument(metavar="ID", help="NAME, NAME@VERSION, NAME@sha256:HEX or an alias.")
]
NewName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name to register: lower-case letters, digits, hyphens."),
]
ServerPath = Annotated[
    str,
    typer.Argument(metavar="PATH", help="PEFT directory, relative to the server's import root."),
]
Replace = Annotated[
    bool, option("Registration", "Move a name that is taken to the new adapter.", "--replace")
]
LoadNow = Annotated[
    bool, option("Registration", "Load the adapter onto the device at once.", "--load")
]
Labels = Annotated[
    list[str] | None,
    option(
        "Registration", "Label of the version. Can be repeated.", "--label", metavar="KEY=VALUE"
    ),
]

ChatTemplate = Annotated[
    Path | None,
    option(
        "Registration",
        "Local Jinja file: the chat template of this version, in place of the base model's. The "
        "server's operator must allow it.",
        "--chat-template",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]
EosTokenIds = Annotated[
    list[int] | None,
    option(
        "Registration",
        "Token that ends the answers of this version, in place of the base model's end tokens. Can "
        "be repeated.",
        "--eos-token-id",
        metavar="ID",
        min=0,
    ),
]
Signature = Annotated[
    Path | None,
    option(
        "Registration",
        "Local file of a signature (`loraplex-server sign`), if the operator requires one.",
        "--signature",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]

Adapter = Annotated[
    str | None,
    option(
        "Model",
        "Adapter to use: NAME, NAME@VERSION or NAME@sha256:HEX. Default: the base model.",
        "--adapter",
        "-a",
        metavar="ID",
    ),
]
System = Annotated[
    str | None, option("Model", "System message of the conversation.", metavar="TEXT")
]

Mix = Annotated[
    list[str] | None,
    option("Model", "One adapter of a weighted mix. Can be repeated.", metavar="ID=WEIGHT"),
]
JsonSchema = Annotated[
    Path | None,
    option(
        "Structured output",
        "Local file of a JSON schema: answer with JSON that is valid by it.",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]
Choice = Annotated[
    list[str] | None,
    option(
        "Structured output",
        "Answer with one of these texts. Can be repeated.",
        metavar="TEXT",
    ),
]
Grammar = Annotated[
    Path | None,
    option(
        "Structured output",
        "Local file of a grammar for Lark or llama.cpp (GBNF): answer with a text of it.",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    option(
        "Stop conditions",
        "End the completion before this text. Can be repeated.",
        metavar="TEXT",
    ),
]
StopTokenId = Annotated[
    list[int] | None,
    option(
        "Stop conditions",
        "End the completion before this token. Can be repeated.",
        metavar="ID",
    ),
]

TemplateVariables = Annotated[
    list[str] | None,
    option(
        "Model",
        "Variable of the chat template; VALUE is JSON, or else a text. Can be repeated.",
        "--chat-template-kwarg",
        metavar="NAME=VALUE",
    ),
]

CHAT: Mapping[str, Any] = {
    "temperature": option(
        "Sampling", "Sampling temperature; 0 is greedy. Default: 1.", "--temperature", "-t"
    ),
    "top_p": option("Sampling", "Sample from the smallest set of tokens with this probability."),
    "seed": option("Sampling", "Random seed; the same seed gives the same tokens."),
    "max_new_tokens": option(
        "Stop conditions", "Largest number of new tokens. Default: 256.", "--max-new-tokens", "-n"
    ),
}
"""The keys of GenerateOptions that are options of `chat` and `generate`."""


def read_template(path: Path | None) -> str:
    """Reads the file of a chat template; "" without one. Raises BadParameter."""
    return read_text(path) or ""


def read_text(path: Path | None) -> str | None:
    """Reads a file as UTF-8; None without one. Raises BadParameter."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as UTF-8 text: {error}") from None


def read_signature(path: Path | None) -> bytes:
    """Reads the file of a signature; b"" without one. Raises BadParameter."""
    try:
        return path.read_bytes() if path is not None else b""
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from None


def parse_pairs(terms: Iterable[str] | None) -> dict[str, str]:
    """Parses `["a=x", "b="]` to `{"a": "x", "b": ""}`. Raises BadParameter."""
    pairs: dict[str, str] = {}
    for term in terms or ():
        key, given, value = term.partition("=")
        if not key or not given or key in pairs:
            raise typer.BadParameter(f"{term!r}: use KEY=VALUE, with each KEY only once")
        pairs[key] = value
    return pairs


def parse_variables(terms: Iterable[str] | None) -> dict[str, Any] | None:
    """Parses `["a=true", "b=x"]` to `{"a": True, "b": "x"}`; None for none. Raises BadParameter."""
    return {name: _value(text) for name, text in parse_pairs(terms).items()} or None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
