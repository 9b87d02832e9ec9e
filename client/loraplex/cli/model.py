"""`loraplex model`, `render`, `tokenize` and `detokenize`: the base model, and prompts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli import options, output
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.cli.terminal import recovered
from loraplex.model.values import (
    DetokenizedText,
    ModelDescription,
    NamedToken,
    RenderedChat,
    TokenizedText,
)
from loraplex.requests import Message


def model(session: Session) -> None:
    """Describe the server's base model, with its end tokens and its chat template."""
    session.show(session.client.get_model(), _write_model)


def render(
    session: Session,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="User message; `-` reads it from standard input."),
    ] = None,
    *,
    messages: Annotated[
        str | None,
        option(
            "Model",
            "JSON file with the messages of a conversation as a list; `-` reads standard input.",
            metavar="FILE",
        ),
    ] = None,
    tools: Annotated[
        str | None,
        option("Model", "JSON file with a list of functions for the model.", metavar="FILE"),
    ] = None,
    adapter: options.Adapter = None,
    system: options.System = None,
    chat_template_kwarg: options.TemplateVariables = None,
    add_generation_prompt: Annotated[
        bool | None,
        option(
            "Model",
            "Open the assistant's next message at the end of the prompt. Default: yes, unless the "
            "last message is continued.",
            "--add-generation-prompt/--no-add-generation-prompt",
        ),
    ] = None,
    continue_final_message: Annotated[
        bool | None,
        option(
            "Model",
            "End the prompt with the text of the last message, which the model then continues. "
            "Default: yes, if the last message is the assistant's.",
            "--continue-final-message/--no-continue-final-message",
        ),
    ] = None,
) -> None:
    """Print the prompt that a conversation is rendered to, without generating."""
    if (prompt is None) == (messages is None):
        raise typer.BadParameter("give either PROMPT or --messages")
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    given: list[Message] = (
        [{"role": "user", "content": recovered(sys.stdin.read()) if prompt == "-" else prompt}]
        if messages is None
        else _read_list(messages)
    )
    done = session.client.render_chat(
        [*opening, *given],
        adapter=adapter,
        tools=None if tools is None else _read_list(tools),
        chat_template_kwargs=options.parse_variables(chat_template_kwarg),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    session.show(done, _write_prompt)


def tokenize(
    session: Session,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="Text; `-` reads it from standard input.")
    ],
    *,
    special_tokens: Annotated[
        bool,
        option(
            "Model",
            "Begin with the token that begins a prompt, if the model has one.",
            "--special-tokens/--no-special-tokens",
        ),
    ] = True,
    pieces: Annotated[
        bool, option("Output", "Print a line with the id and the text of each token.", "--pieces")
    ] = False,
) -> None:
    """Print the tokens of TEXT."""
    given = recovered(sys.stdin.read()) if text == "-" else text
    done = session.client.tokenize(given, special_tokens=special_tokens, pieces=pieces)
    session.show(done, _write_tokens)


def detokenize(
    session: Session,
    token_ids: Annotated[list[int], typer.Argument(metavar="ID...", help="Token ids.", min=0)],
    *,
    skip_special_tokens: Annotated[
        bool,
        option("Output", "Leave special tokens out of the text.", "--skip-special-tokens"),
    ] = False,
) -> None:
    """Print the text of tokens."""
    done = session.client.detokenize(token_ids, skip_special_tokens=skip_special_tokens)
    session.show(done, _write_text)


def _read_list(path: str) -> list[Any]:
    """The list in a JSON file. Raises BadParameter."""
    try:
        text = recovered(sys.stdin.read()) if path == "-" else Path(path).read_text("utf-8")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    if not isinstance(value, list):
        raise typer.BadParameter(f"{path}: the file must hold a JSON list")
    return value


def _write_model(found: ModelDescription) -> None:
    """Prints a line `name: value` for each field, and for those of the chat template."""
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name == "chat_template":  # at the end
            continue
        if isinstance(value, tuple):
            value = " ".join(map(_named, value)) or "none"
        elif isinstance(value, NamedToken):
            value = _named(value)
        print(f"{field.name}: {'none' if value is None else value}")
    template = found.chat_template
    if template is None:
        print("chat_template: none")
        return
    for field in dataclasses.fields(template):
        if field.name == "text":  # a page or more; --json has it
            continue
        value = getattr(template, field.name)
        text = (" ".join(value) or "none") if isinstance(value, tuple) else value
        print(f"chat_template.{field.name}: {text}")


def _named(token: NamedToken) -> str:
    return f"{token.token_id} {json.dumps(token.text, ensure_ascii=False)}"


def _write_prompt(prompt: RenderedChat) -> None:
    output.write_text(prompt.text)
    if sys.stdout.isatty() and not prompt.text.endswith("\n"):
        output.write_text("\n")
    if sys.stderr.isatty():
        output.note(f"[{len(prompt.token_ids)} tokens]")


def _write_tokens(found: TokenizedText) -> None:
    if not found.pieces:
        print(*found.token_ids)
    for token, piece in zip(found.token_ids, found.pieces, strict=False):
        text = piece.decode(errors="backslashreplace")
        print(token, json.dumps(text, ensure_ascii=False), sep="\t")


def _write_text(found: DetokenizedText) -> None:
    output.write_text(found.text + "\n")
