"""`loraplex chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

from loraplex import errors
from loraplex.cli import options, output
from loraplex.cli.session import Session, complain
from loraplex.cli.terminal import recovered
from loraplex.requests import GenerateOptions, Message

HELP = """\
/adapter NAME  answer with this adapter; without NAME, with the base model
/reset         start a new conversation
/quit          leave the chat, like Ctrl-D; Ctrl-C stops an answer"""


def chat(
    session: Session,
    *,
    adapter: options.Adapter = None,
    system: options.System = None,
    chat_template_kwarg: options.TemplateVariables = None,
    given: Annotated[GenerateOptions, options.CHAT],
) -> None:
    """Chat with the model; /help lists the chat's own commands."""
    variables = options.parse_variables(chat_template_kwarg)
    chosen: GenerateOptions = {**given, "chat_template_kwargs": variables}
    Conversation(session, adapter or "", system, chosen).run()


class Conversation:
    """The messages so far, and the adapter that answers next."""

    def __init__(
        self, session: Session, adapter: str, system: str | None, chosen: GenerateOptions
    ) -> None:
        self._session = session
        self._adapter = adapter
        self._opening: list[Message] = (
            [{"role": "system", "content": system}] if system is not None else []
        )
        self._messages = list(self._opening)
        self._options = chosen

    def run(self) -> None:
        """Reads messages and commands until /quit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - line editing and history for input()
            output.note("/help lists the commands")
        while True:
            try:
                asked = input(f"{self._adapter or 'base'}> " if interactive else "")
            except (EOFError, KeyboardInterrupt):
                if interactive:
                    print()
                return
            line = recovered(asked).strip()
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
            self._messages = list(self._opening)
            output.note("started a new conversation")
        elif word == "/help":
            output.note(HELP)
        else:
            output.note(f"no command {word}\n{HELP}")

    def _answer(self, line: str) -> None:
        """Prints the answer. A message without a complete answer leaves the conversation."""
        messages: list[Message] = [*self._messages, {"role": "user", "content": line}]
        chosen: GenerateOptions = {
            **self._options,
            "messages": messages,
            "adapter": self._adapter,
        }
        try:
            text = output.write_stream(self._session.client.stream(**chosen))
        except KeyboardInterrupt:
            output.note("stopped")
        except errors.LoraplexError as error:
            complain(error, self._session.target)
        else:
            self._messages = [*messages, {"role": "assistant", "content": text}]
