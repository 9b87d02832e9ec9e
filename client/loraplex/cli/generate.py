"""`loraplex generate`: one prompt, answered live."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loraplex import channel
from loraplex.cli import live, options, output
from loraplex.cli.session import session
from loraplex.requests import GenerateOptions, Message


def generate(
    ctx: typer.Context,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from standard input.")
    ],
    adapter: options.Adapter = None,
    mix: options.Mix = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a user's turn, for the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system turn before it; implies --chat.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Alternatives per token; shown with --json.")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Higher first, -100 to 100.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")
    ] = True,
    as_json: options.Json = False,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Continue PROMPT with the base model, an adapter or a mix of adapters."""
    text = sys.stdin.read() if prompt == "-" else prompt
    chosen: GenerateOptions = {
        "adapter": adapter,
        "mix": options.parse_mix(mix or ()),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "stop": stop,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
        "priority": priority,
    }
    as_prompt: str | None = text
    if chat or system is not None:
        as_prompt = None
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        chosen["messages"] = [*opening, {"role": "user", "content": text}]
    with session(ctx, server, timeout) as client:
        if as_json:
            output.write_json(client.generate(as_prompt, **chosen))
        elif stream:
            live.show(client.stream(as_prompt, **chosen))
        else:
            completion = client.generate(as_prompt, **chosen)
            output.write_text(completion.text + "\n")
            output.write_summary(completion.finish_reason, completion.usage, completion.adapters)
