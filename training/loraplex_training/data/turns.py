"""The answers of a conversation, each with the prompt that the server would get for it.

What a template cannot render is taken out of the conversation first, and counted: a template that
does not read tools or tool calls leaves them out silently. An answer whose calls are left out is
not learned, because it would teach the model to end its turn where it should have called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate
from loraplex_model.checkpoints.chat_messages import joined_text
from loraplex_model.checkpoints.encoding import MarkedChat

from loraplex_training.data.problems import Dropped
from loraplex_training.data.shapes import DataRecord, Message
from loraplex_training.data.text import BaseText

_OPEN: Final[Mapping[str, Any]] = {
    "add_generation_prompt": True,
    "continue_final_message": False,
}
_CLOSED: Final[Mapping[str, Any]] = {**_OPEN, "add_generation_prompt": False}
_MARK: Final = "loraplex"
"""A content whose place in a rendered text shows what the template writes after a content."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, which ends with an end token, and the prompt that the server would get for it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class TemplateTalk:
    """A conversation as a template can render it.

    Attributes:
        given: indices of answers that are not learned.
    """

    messages: Sequence[Message]
    options: ChatOptions
    given: frozenset[int]


class TurnMaker:
    """Makes turns of conversations and plain prompts.

    Attributes:
        left_out: what templates left out of conversations, with the number of conversations.
    """

    def __init__(self, text: BaseText, strict: bool = False) -> None:
        """`strict` drops conversations of which the template leaves something out."""
        self._strict = strict
        self.left_out: Counter[str] = Counter()
        self._text = text

    def fitted(self, record: DataRecord, messages: Sequence[Message]) -> TemplateTalk:
        """Returns `messages`, whose last ones are the record's, as the template can render them.

        Raises:
            ValueError: the base model has no template.
            Dropped: the template leaves out all answers, or anything if that is not allowed.
        """
        template = self._text.template
        if template is None:
            raise ValueError(
                "is a conversation, and the base model has no chat template; write a prompt and a "
                "completion as strings, or text"
            )
        added = len(messages) - len(record.messages)
        given = {at + added for at in record.given}
        lost = []
        tools = record.tools
        if tools and not template.takes_tools:
            tools = ()
            lost.append("tools")
        made = list(messages)
        able = template.abilities
        for at, message in enumerate(messages):
            if "tool_calls" in message and not able.tool_calls:
                made[at] = message = _without_calls(message)
                given.add(at)
                lost.append("tool calls")
            if isinstance(message["content"], list) and not able.parts:
                made[at] = {**message, "content": joined_text(message["content"])}
            if "reasoning_content" in message and not _reads_reasoning(template):
                lost.append("reasoning_content")
        variables = {k: v for k, v in record.variables.items() if k in template.variables}
        lost += [f"the variable {key}" for key in record.variables.keys() - variables.keys()]
        if lost and self._strict:
            what = ", ".join(dict.fromkeys(lost))
            raise Dropped(f"is a conversation of which the chat template leaves out {what}")
        answers = {at for at, message in enumerate(made) if message["role"] == "assistant"}
        if answers <= given:
            raise Dropped("has answers with tool calls only, which the chat template leaves out")
        options = ChatOptions(tools=tools, variables=variables)
        self.left_out.update(set(lost))
        return TemplateTalk(made, options, frozenset(given))

    def chat_turn(self, talk: TemplateTalk, at: int) -> Turn:
        """Returns the turn whose answer is the message `at`. Raises Dropped, TextRefused."""
        answer = self._checked(talk.messages[at])
        chat = self._text.conversation([*talk.messages[:at], answer], talk.options)
        self._check_ends(answer, chat.is_marked)
        *before, answer = chat.messages
        prompt = chat.render(before, replace(chat.options, **_OPEN))
        whole = chat.render([*before, answer], replace(chat.options, **_CLOSED))
        content = _text_of(answer)
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
        else:
            rest = content + self._tail(chat, before, answer)
        encode = partial(self._text.chat_ids, chat)
        ids = encode(prompt)
        made = self._continued(ids, encode(prompt + rest), rest, encode)
        ended = self._ended(made)
        if ended is None:
            # The template writes no end token. Add one after the template's own end of turn, but
            # before the white space between turns.
            kept = content if rest.startswith(content) else ""
            rest = kept + rest[len(kept) :].rstrip()
            made = self._continued(ids, encode(prompt + rest), rest, encode)
            ended = [*made, self._text.eos]
        return Turn(ids, ended)

    def plain_turn(self, prompt: str, answer: Message) -> Turn:
        """Returns the turn of a plain prompt. Raises ValueError, Dropped."""
        answer = self._checked(answer)
        self._check_ends(answer, are_text=False)
        content = _text_of(answer)
        ids = self._text.prompt_ids(prompt)
        made = self._continued(
            ids, self._text.prompt_ids(prompt + content), content, self._text.ids
        )
        return Turn(ids, self._ended(made) or [*made, self._text.eos])

    def _tail(self, chat: MarkedChat, before: Sequence[Message], answer: Message) -> str:
        """Returns what the template writes after an answer.

        It is needed where the template opens a new answer differently from one in the conversation.
        Raises Dropped if the answer has tool calls, whose place is then not known.
        """
        if "tool_calls" in answer:
            raise Dropped(
                "has an answer with tool calls, which the chat template opens differently from an "
                "answer to be generated"
            )
        marked = {**answer, "content": _MARK}
        shown = chat.render([*before, marked], replace(chat.options, **_CLOSED))
        return shown.rpartition(_MARK)[2] if _MARK in shown else ""

    def _checked(self, answer: Message) -> Message:
        """Returns an answer without an end token spelt out at its end. Raises Dropped."""
        content = answer["content"]
        if isinstance(content, list):
            *parts, last = content
            last = {**last, "text": self._without_end(last["text"])}
            answer = {**answer, "content": [*parts, last]}
        elif content is not None:
            answer = {**answer, "content": self._without_end(content)}
        if "tool_calls" not in answer and not _text_of(answer).strip():
            raise Dropped("has an answer that is empty")
        return answer

    def _without_end(self, content: str) -> str:
        ends = tuple(filter(None, map(self._text.token, self._text.eos_ids)))
        while (shorter := content.rstrip()).endswith(ends):
            content = next(shorter.removesuffix(end) for end in ends if shorter.endswith(end))
        return content

    def _check_ends(self, answer: Message, are_text: bool) -> None:
        """Raises ValueError for an end token within an answer that would be recognised as such."""
        for eos in map(self._text.token, self._text.eos_ids):
            if eos and not are_text and eos in _text_of(answer):
                raise ValueError(f"has an answer with {eos} in it, where the model would stop")

    def _continued(
        self, prompt: list[int], whole: list[int], rest: str, encode: Callable[[str], list[int]]
    ) -> list[int]:
        """Returns the ids of `rest` after `prompt`; `whole` are the ids of both texts together."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # Tokens merge at the border. Some tokenizers add a space before the first word of a text,
        # so tokenise `rest` after a token that it does not merge with.
        for anchor in ("\n", self._text.token(self._text.eos)):
            ahead = encode(anchor)
            both = encode(anchor + rest)
            if both[: len(ahead)] == ahead:
                return both[len(ahead) :]
        return encode(rest)

    def _ended(self, answer: list[int]) -> list[int] | None:
        """Returns the answer up to its first end token, or None if it has none."""
        for at, token in enumerate(answer):
            if token in self._text.eos_ids:
                return answer[: at + 1]
        return None


def _reads_reasoning(template: ChatTemplate) -> bool:
    return any(name in template.source for name in ("reasoning", "thinking"))


def _without_calls(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": message["content"] or ""}


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
