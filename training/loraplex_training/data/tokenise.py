"""Examples to tokens, and which of them are learned.

The rule is what the server does: before each answer that is learned stand the very ids that the
server makes of the conversation so far, and the answer ends with the id that ends a generation.
Where a template writes an earlier answer in another way once it is history (without its reasoning,
say), or where tokens merge across an answer's beginning, one sequence cannot hold both answers
under that rule; then the conversation becomes several examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from loraplex_training.data.records import Message, Record
from loraplex_training.data.samples import Sample
from loraplex_training.data.text import BaseText

_AUTO: Final = {
    "messages": "assistant",
    "prompt": "completion",
    "instruction": "completion",
    "text": "all",
}


@dataclass(frozen=True, slots=True)
class _Turn:
    """An answer and what the server is asked it with; `answer` ends with an EOS id."""

    prompt: list[int]
    answer: list[int]


class Tokeniser:
    """Makes samples of records."""

    def __init__(self, text: BaseText, max_length: int, learn: str, system: str | None) -> None:
        """Arguments are those of DataSpec."""
        self._text = text
        self._max_length = max_length
        self._learn = learn
        self._system = system

    def samples(self, record: Record) -> list[Sample]:
        """What a record becomes: one sample, or several where the template wants it.

        One of which nothing is learned any more, as its answer lies behind `max_length`, is left
        out; so the list may be empty.

        Raises:
            TextRefused, ValueError: the line cannot be used; the message completes "this line …".
        """
        learn = _AUTO[record.shape] if self._learn == "auto" else self._learn
        made = self._of_text(record, learn) if record.shape == "text" else self._of(record, learn)
        return [sample for sample in made if any(sample.learned)]

    def _of_text(self, record: Record, learn: str) -> list[Sample]:
        if learn != "all":
            raise ValueError(f'is {{"text"}}, which has no answer that learn="{learn}" could learn')
        tokens = self._text.prompt_ids(record.text)
        if not tokens or tokens[-1] not in self._text.eos_ids:
            tokens.append(self._text.eos)
        reference = self._text.decode(tokens[1:-1])
        return [self._cut(tokens, [True] * len(tokens), 1, reference, record.line)]

    def _of(self, record: Record, learn: str) -> list[Sample]:
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

    def _turns(self, record: Record, learn: str) -> Iterator[_Turn]:
        """The answers that are learned; for "all" only the last, as the rest is before it."""
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

    def _with_system(self, record: Record) -> tuple[Message, ...]:
        if self._system is None or record.messages[0]["role"] == "system":
            return record.messages
        return ({"role": "system", "content": self._system}, *record.messages)

    def _checked(self, content: str) -> str:
        """The answer without an EOS that was written at its end by hand."""
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
        answer = self._continued(ids, self._text.prompt_ids(prompt + content), content)
        return _Turn(ids, self._ended(answer) or [*answer, self._text.eos])

    def _chat_turn(self, before: Sequence[Message], content: str) -> _Turn:
        prompt = self._text.render(before, True)
        told = self._text.render([*before, {"role": "assistant", "content": content}], False)
        if told.startswith(prompt):
            rest = told[len(prompt) :]
        else:
            # The opening of a new answer is not how a told one begins: the answer, and what
            # the template writes behind it.
            _, found, tail = told.rpartition(content.strip())
            rest = content + tail if found else content
        ids = self._text.ids(prompt)
        answer = self._continued(ids, self._text.ids(prompt + rest), rest)
        ended = self._ended(answer)
        if ended is None:
            # No EOS by the template: after its own end of turn, but not after the space between
            # this turn and the next.
            kept = content if rest.startswith(content) else ""
            rest = kept + rest[len(kept) :].rstrip()
            answer = self._continued(ids, self._text.ids(prompt + rest), rest)
            ended = [*answer, self._text.eos]
        return _Turn(ids, ended)

    def _continued(self, prompt: list[int], whole: list[int], rest: str) -> list[int]:
        """The ids of `rest` behind `prompt`, where `whole` is what both are in one piece."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # They merge where they meet. Some tokenizers put a space before a text's first word, so
        # it is tokenised behind something else that it does not merge with.
        for anchor in ("\n", self._text.token(self._text.eos)):
            ahead = self._text.ids(anchor)
            both = self._text.ids(anchor + rest)
            if both[: len(ahead)] == ahead:
                return both[len(ahead) :]
        return self._text.ids(rest)

    def _ended(self, answer: list[int]) -> list[int] | None:
        """The answer up to its first EOS, if it has one."""
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
            (False, *learned[1:kept]),  # nothing is before the first, to predict it from
            max(1, prompt) if prompt < kept else 1,
            reference,
            line,
            len(tokens) - kept,
        )
