"""Tokenises examples and decides which tokens are learned.

The rule follows the server: a learned answer is preceded by the same ids that the server makes of
the conversation so far, and ends with an id that ends a generation. A template may render an
earlier answer differently (without its reasoning, for example), and tokens may merge across the
start of an answer. One sequence can then not contain both answers under that rule, and the
conversation becomes several examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from loraplex_model.checkpoints.chat import ChatOptions

from loraplex_training.data.samples import Sample
from loraplex_training.data.shapes import DataRecord, Message
from loraplex_training.data.text import BaseText

_AUTO: Final = {
    "messages": "assistant",
    "prompt": "completion",
    "instruction": "completion",
    "text": "all",
}

_OPEN: Final = ChatOptions(add_generation_prompt=True, continue_final_message=False)
_CLOSED: Final = ChatOptions(add_generation_prompt=False, continue_final_message=False)


@dataclass(frozen=True, slots=True)
class _Turn:
    """An answer, which ends with an EOS id, and the prompt that the server would get for it."""

    prompt: list[int]
    answer: list[int]


class Tokeniser:
    """Converts records to samples."""

    def __init__(self, text: BaseText, max_length: int, learn: str, system: str | None) -> None:
        """Arguments are those of DataSpec."""
        self._text = text
        self._max_length = max_length
        self._learn = learn
        self._system = system

    def samples(self, record: DataRecord) -> list[Sample]:
        """Returns the samples of a record: one, or several if the template requires that.

        Samples whose answer starts beyond `max_length` are dropped, so the list may be empty.

        Raises:
            TextRefused, ValueError: the line cannot be used; the message completes "this line …".
        """
        learn = _AUTO[record.shape] if self._learn == "auto" else self._learn
        made = self._of_text(record, learn) if record.shape == "text" else self._of(record, learn)
        return [sample for sample in made if any(sample.learned)]

    def _of_text(self, record: DataRecord, learn: str) -> list[Sample]:
        if learn != "all":
            raise ValueError(f'is {{"text"}}, which has no answer that learn="{learn}" could learn')
        tokens = self._text.prompt_ids(record.text)
        if not tokens or tokens[-1] not in self._text.eos_ids:
            tokens.append(self._text.eos)
        reference = self._text.decode(tokens[1:-1])
        return [self._cut(tokens, [True] * len(tokens), 1, reference, record.line)]

    def _of(self, record: DataRecord, learn: str) -> list[Sample]:
        turns = list(self._turns(record, learn))
        samples = []
        while turns:
            prompt, reference = len(turns[0].prompt), self._text.decode(turns[0].answer[:-1])
            tokens: list[int] = []
            learned: list[bool] = []
            while turns and turns[0].prompt[: len(tokens)] == tokens:
                turn = turns.pop(0)
                learned += [learn == "all"] * (len(turn.prompt) - len(tokens))
                learned += [True] * len(turn.answer)
                tokens = turn.prompt + turn.answer
            samples.append(self._cut(tokens, learned, prompt, reference, record.line))
        return samples

    def _turns(self, record: DataRecord, learn: str) -> Iterator[_Turn]:
        """Yields the learned answers; for "all" only the last one, which all else precedes."""
        messages = self._with_system(record)
        added = len(messages) - len(record.messages)
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            wanted = (
                learn == "assistant"
                or at == len(messages) - 1
                or (learn == "completion" and at >= record.answer + added)
            )
            if wanted:
                content = self._checked(message["content"])
                if self._text.has_template or record.plain is None:
                    yield self._chat_turn(messages[:at], content)
                else:
                    yield self._plain_turn(record.plain, content)

    def _with_system(self, record: DataRecord) -> tuple[Message, ...]:
        if self._system is None or record.messages[0]["role"] == "system":
            return record.messages
        return ({"role": "system", "content": self._system}, *record.messages)

    def _checked(self, content: str) -> str:
        """Returns the answer without an EOS spelt out at its end. Raises ValueError."""
        for eos in map(self._text.token, self._text.eos_ids):
            if eos:
                content = content.removesuffix(eos)
                if eos in content:
                    raise ValueError(f"has an answer with {eos} in it, where the model would stop")
        if not content.strip():
            raise ValueError("has an answer that is empty")
        return content

    def _plain_turn(self, prompt: str, content: str) -> _Turn:
        ids = self._text.prompt_ids(prompt)
        answer = self._continued(
            ids, self._text.prompt_ids(prompt + content), content, self._text.ids
        )
        return _Turn(ids, self._ended(answer) or [*answer, self._text.eos])

    def _chat_turn(self, before: Sequence[Message], content: str) -> _Turn:
        answer: Message = {"role": "assistant", "content": content}
        chat = self._text.conversation([*before, answer])
        *before, answer = chat.messages
        content = answer["content"]
        prompt = chat.render(before, _OPEN)
        whole = chat.render([*before, answer], _CLOSED)
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
        else:
            # The template opens a new answer differently from one in the conversation. Take the
            # answer and the text that the template writes after it.
            _, found, tail = whole.rpartition(content.strip())
            rest = content + tail if found else content
        encode = partial(self._text.chat_ids, chat)
        ids = encode(prompt)
        made = self._continued(ids, encode(prompt + rest), rest, encode)
        ended = self._ended(made)
        if ended is None:
            # The template writes no EOS. Add one after the template's own end of turn, but before
            # the white space between turns.
            kept = content if rest.startswith(content) else ""
            rest = kept + rest[len(kept) :].rstrip()
            made = self._continued(ids, encode(prompt + rest), rest, encode)
            ended = [*made, self._text.eos]
        return _Turn(ids, ended)

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
        """Returns the answer up to its first EOS, or None if it has none."""
        for at, token in enumerate(answer):
            if token in self._text.eos_ids:
                return answer[: at + 1]
        return None

    def _cut(
        self, tokens: list[int], learned: list[bool], prompt: int, reference: str, line: int
    ) -> Sample:
        kept = min(len(tokens), self._max_length)
        return Sample(
            tuple(tokens[:kept]),
            (False, *learned[1:kept]),  # nothing precedes the first token to predict it from
            max(1, prompt) if prompt < kept else 1,
            reference,
            line,
            len(tokens) - kept,
        )
