"""An example as read from its file, whatever its shape was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """An example as written in its file.

    Attributes:
        shape: name of its shape, such as "messages" or "prompt".
        messages: the conversation, which ends with an answer; () for "text". A prompt or
            instruction is a turn of the user, its completion or output the answer.
        answer: index of the completion's first message; of the last message for conversations.
        text: the text of the shape "text", else "".
        plain: the prompt for a base model without chat template; None if one is needed.
        line: line number, from 1.
        tools: descriptions of functions that the model may call.
        variables: further variables of the chat template.
        given: indices of answers that are not to be learned.
    """

    shape: str
    messages: tuple[Message, ...]
    answer: int
    text: str
    plain: str | None
    line: int
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[int] = frozenset()

    def digest(self) -> bytes:
        """Returns the SHA-256 of the content, whatever the shape or layout of the line."""
        words: Any = [_words(message) for message in self.messages] or self.text
        if self.tools or self.variables or self.given:
            words = [words, list(self.tools), dict(self.variables), sorted(self.given)]
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).digest()


def _words(message: Message) -> object:
    if message.keys() == {"role", "content"}:
        return [message["role"], message["content"]]
    return dict(message)
