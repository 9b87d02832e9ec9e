"""`loraplex generate`: continues one prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from loraplex.cli import options, output
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.cli.terminal import recovered
from loraplex.requests import GenerateOptions, Message
from loraplex.results import Alternative, Completion

_COMPLETION: Mapping[str, Any] = {
    **options.CHAT,
    "top_k": option("Sampling", "Sample from the k most probable tokens; 0 keeps all tokens."),
    "min_p": option("Sampling", "Smallest probability, as a share of the most probable token's."),
    "repetition_penalty": option(
        "Sampling", "Penalty on tokens of the prompt and the output; 1 is none."
    ),
    "presence_penalty": option("Sampling", "Penalty on each token already generated, -2 to 2."),
    "frequency_penalty": option(
        "Sampling", "Penalty per occurrence of a token in the output, -2 to 2."
    ),
    "n": option(
        "Sampling", "Number of completions of the prompt, 1 to 128. They are not streamed.", "--n"
    ),
    "min_new_tokens": option(
        "Stop conditions", "Smallest number of new tokens: nothing ends the completion before."
    ),
    "include_stop_string": option(
        "Stop conditions",
        "Print the text of --stop that ended the completion, too.",
        "--include-stop-string",
    ),
    "json_object": option("Structured output", "Answer with a JSON object.", "--json-object"),
    "regex": option(
        "Structured output", "Answer with a text that the expression matches.", metavar="EXPRESSION"
    ),
    "ignore_eos": option(
        "Stop conditions", "Continue past the end tokens of the model or adapter.", "--ignore-eos"
    ),
    "skip_special_tokens": option(
        "Output",
        "Leave special tokens out of the text. Default: they are left out.",
        "--skip-special-tokens/--no-skip-special-tokens",
    ),
    "logprobs": option("Output", "Alternatives reported for each token, with --json."),
    "priority": option("Server", "Priority of the request, -10 to 10; higher is admitted first."),
    "cache_salt": option(
        "Server", "Share computed prompts only with requests that send the same text."
    ),
}


def generate(
    session: Session,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Prompt; `-` reads it from standard input.")
    ],
    *,
    adapter: options.Adapter = None,
    mix: options.Mix = None,
    chat: Annotated[
        bool,
        option("Model", "Treat PROMPT as a user message and apply the chat template.", "--chat"),
    ] = False,
    system: options.System = None,
    chat_template_kwarg: options.TemplateVariables = None,
    given: Annotated[GenerateOptions, _COMPLETION],
    json_schema: options.JsonSchema = None,
    choice: options.Choice = None,
    grammar: options.Grammar = None,
    stop: options.Stop = None,
    stop_token_id: options.StopTokenId = None,
    stream: Annotated[
        bool, option("Output", "Print tokens as they are generated.", "--stream/--no-stream")
    ] = True,
) -> None:
    """Continue PROMPT with the base model, an adapter or a mix of adapters."""
    text = recovered(sys.stdin.read()) if prompt == "-" else prompt
    chosen: GenerateOptions = {
        **given,
        "adapter": adapter,
        "mix": _parse_mix(mix or ()),
        "json_schema": options.read_text(json_schema),
        "choices": choice,
        "grammar": options.read_text(grammar),
        "stop": stop,
        "stop_token_ids": stop_token_id,
        "chat_template_kwargs": options.parse_variables(chat_template_kwarg),
    }
    as_prompt: str | None = text
    if chat or system is not None or chat_template_kwarg:
        as_prompt = None
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        chosen["messages"] = [*opening, {"role": "user", "content": text}]
    if stream and not session.as_json and (given.get("n") or 1) == 1:
        output.write_stream(session.client.stream(as_prompt, **chosen))
    else:
        session.show(session.client.generate(as_prompt, **chosen), _write)


def _write(completion: Completion) -> None:
    parts: list[Completion | Alternative] = [completion, *completion.alternatives]
    if len(parts) > 1:
        for number, each in enumerate(parts, 1):
            output.write_text(f"[{number}]\n{each.text}\n")
    else:
        output.write_text(completion.text + "\n")
    output.write_summary(completion)


def _parse_mix(terms: Iterable[str]) -> dict[str, float | None]:
    """Parses `["a=0.5", "b"]` to `{"a": 0.5, "b": None}`. Raises BadParameter."""
    mix: dict[str, float | None] = {}
    for term in terms:
        name, given, weight = term.partition("=")
        try:
            value = float(weight) if given else None
        except ValueError:
            value = float("nan")
        if not name or name in mix or (value is not None and value != value):
            raise typer.BadParameter(
                f"{term!r}: use ID=WEIGHT, such as --mix pirate=0.5, with each ID only once"
            )
        mix[name] = value
    return mix
