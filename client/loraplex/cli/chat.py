"""`loraplex chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from loraplex import channel, errors
from loraplex.cli import live, options, output
from loraplex.cli.session import complain, session
from loraplex.client import Client
from loraplex.requests import GenerateOptions, Message

HELP = """\
/adapter NAME  answer with this adapter; without NAME, with the base model
/reset         forget the conversation
/quit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    ctx: typer.Context,
    adapter: options.Adapter = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system turn it begins with.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    timeout: options.Timeout = channel.DEFAULT_TIMEOUT,
    server: options.Server = None,
) -> None:
    """Talk with the model; /help lists the commands."""
    sampling: GenerateOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    with session(ctx, server, timeout) as client:
        target = server or ctx.obj or channel.DEFAULT_TARGET
        Conversation(client, target, adapter or "", system, sampling).run()


class Conversation:
    """The turns so far, and the adapter that answers next."""

    def __init__(
        self,
        client: Client,
        target: str,
        adapter: str,
        system: str | None,
        sampling: GenerateOptions,
    ) -> None:
        self._client = client
        self._target = target
        self._adapter = adapter
        self._opening: list[Message] = (
            [{"role": "system", "content": system}] if system is not None else []
        )
        self._turns = list(self._opening)
        self._sampling = sampling

    def run(self) -> None:
        """Read turns and commands until /quit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - line editing and history for input()
            output.note("/help lists the commands")
        while True:
            try:
                line = input(f"{self._adapter or 'base'}> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                if interactive:
                    print()
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        word, _, argument = line.partition(" ")
        if word == "/adapter":
            self._adapter = argument.strip()
            output.note(f"answering with {self._adapter or 'the base model'}")
        elif word == "/reset":
            self._turns = list(self._opening)
            output.note("conversation forgotten")
        elif word == "/help":
            output.note(HELP)
        else:
            output.note(f"no command {word}\n{HELP}")

    def _answer(self, line: str) -> None:
        """Stream the reply. A turn that got no whole answer is dropped from the conversation."""
        turns: list[Message] = [*self._turns, {"role": "user", "content": line}]
        chosen: GenerateOptions = {
            **self._sampling,
            "messages": turns,
            "adapter": self._adapter,
        }
        try:
            text = live.show(self._client.stream(**chosen))
        except KeyboardInterrupt:
            output.note("stopped")
        except errors.LoraplexError as error:
            complain(error, self._target)
        else:
            self._turns = [*turns, {"role": "assistant", "content": text}]
