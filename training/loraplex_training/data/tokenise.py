"""Tokenises examples and decides which tokens are learned.

The rule follows the server: a learned answer is preceded by the same ids that the server makes of
the conversation so far, and ends with an id that ends a generation. A template may render an
earlier answer differently (without its reasoning, for example), and tokens may merge across the
start of an answer. One sequence can then not contain both answers under that rule, and the
conversation becomes several examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraplex_training.data.problems import Dropped
from loraplex_training.data.samples import Sample
from loraplex_training.data.shapes import CHATS, TEXT, DataRecord, Message
from loraplex_training.data.text import BaseText
from loraplex_training.data.turns import TemplateTalk, Turn, TurnMaker


class Tokeniser:
    """Converts records to samples."""

    def __init__(
        self,
        text: BaseText,
        max_length: int,
        learn: str,
        system: str | None,
        strict: bool = False,
    ) -> None:
        """Arguments are those of DataSpec."""
        self._text = text
        self._max_length = max_length
        self._learn = learn
        self._system = system
        self._maker = TurnMaker(text, strict)

    @property
    def left_out(self) -> Mapping[str, int]:
        """What the chat template left out of records, with the number of records."""
        return self._maker.left_out

    def samples(self, record: DataRecord) -> list[Sample]:
        """Returns the samples of a record: one, or several if the template requires that.

        Samples whose answer starts beyond `max_length` are dropped, so the list may be empty.

        Raises:
            ValueError: the line cannot be used; the message completes "this line …".
            Dropped, TextRefused: nothing can be learned from it with this template.
        """
        learn = self._learn
        if learn == "auto":
            learn = _usual(record.shape)
        if record.shape == TEXT:
            made = self._of_text(record, learn)
        elif not self._text.has_template and record.plain is not None:
            [*_, answer] = record.messages
            made = self._joined([self._maker.plain_turn(record.plain, answer)], learn, record.line)
        else:
            made = self._of_chat(record, learn)
        return [sample for sample in made if any(sample.learned)]

    def _of_text(self, record: DataRecord, learn: str) -> list[Sample]:
        if learn != "all":
            raise ValueError(f'is {{"text"}}, which has no answer that learn="{learn}" could learn')
        tokens = self._text.prompt_ids(record.text)
        if not tokens or tokens[-1] not in self._text.eos_ids:
            tokens.append(self._text.eos)
        reference = self._text.decode(tokens[1:-1])
        return [self._cut(tokens, [True] * len(tokens), 1, reference, record.line)]

    def _of_chat(self, record: DataRecord, learn: str) -> list[Sample]:
        messages = self._with_system(record)
        talk = self._maker.fitted(record, messages)
        answers = [at for at, one in enumerate(messages) if one["role"] == "assistant"]
        if learn == "all":
            return [self._whole(talk, answers, record.line)]
        first = record.answer + len(messages) - len(record.messages)
        if learn == "completion":
            answers = [at for at in answers if at >= first or at == len(messages) - 1]
        wanted = [at for at in answers if at not in talk.given]
        if not wanted:
            raise Dropped("has no answer to learn, since the last one is not to be learned")
        turns = [self._maker.chat_turn(talk, at) for at in wanted]
        return self._joined(turns, learn, record.line)

    def _whole(self, talk: TemplateTalk, answers: Sequence[int], line: int) -> Sample:
        """Returns one sample in which all is learned but the answers that are given."""
        last = self._maker.chat_turn(talk, answers[-1])
        tokens = last.prompt + last.answer
        learned = [True] * len(tokens)
        for at in talk.given:
            if not talk.messages[at]["content"]:  # its calls are left out, so nothing is learned
                continue
            turn = self._maker.chat_turn(talk, at)
            both = turn.prompt + turn.answer
            if tokens[: len(both)] != both:
                raise Dropped(
                    "has an answer that is not to be learned, and the chat template renders it "
                    "differently later, so --learn all cannot leave it out"
                )
            learned[len(turn.prompt) : len(both)] = [False] * len(turn.answer)
        return self._cut(tokens, learned, len(last.prompt), self._reference(last), line)

    def _joined(self, turns: list[Turn], learn: str, line: int) -> list[Sample]:
        """Returns samples, each with as many turns as follow each other without a difference."""
        samples = []
        while turns:
            prompt, reference = len(turns[0].prompt), self._reference(turns[0])
            tokens: list[int] = []
            learned: list[bool] = []
            while turns and turns[0].prompt[: len(tokens)] == tokens:
                turn = turns.pop(0)
                learned += [learn == "all"] * (len(turn.prompt) - len(tokens))
                learned += [True] * len(turn.answer)
                tokens = turn.prompt + turn.answer
            samples.append(self._cut(tokens, learned, prompt, reference, line))
        return samples

    def _reference(self, turn: Turn) -> str:
        return self._text.decode(turn.answer[:-1])

    def _with_system(self, record: DataRecord) -> tuple[Message, ...]:
        if self._system is None or record.messages[0]["role"] in ("system", "developer"):
            return record.messages
        return ({"role": "system", "content": self._system}, *record.messages)

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


def _usual(shape: str) -> str:
    """Returns what is learned of a shape by default."""
    if shape == TEXT:
        return "all"
    return "assistant" if shape in CHATS else "completion"
