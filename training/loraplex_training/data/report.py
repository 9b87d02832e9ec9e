"""What was read from the files of a data set, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraplex_adapters.format.strict_json import shown

from loraplex_training.data.problems import DroppedLine
from loraplex_training.data.samples import Sample


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of the training or the evaluation examples.

    Attributes:
        learned: number of learned tokens.
        longest: number of tokens of the longest example.
        truncated: number of examples that were cut at `max_length`.
        cut: number of tokens that these lost.
    """

    examples: int
    tokens: int
    learned: int
    longest: int
    truncated: int
    cut: int

    @staticmethod
    def of(samples: Sequence[Sample]) -> Counts:
        return Counts(
            len(samples),
            sum(len(s.tokens) for s in samples),
            sum(sum(s.learned) for s in samples),
            max((len(s.tokens) for s in samples), default=0),
            sum(s.truncated > 0 for s in samples),
            sum(s.truncated for s in samples),
        )


@dataclass(frozen=True, slots=True)
class FileCounts:
    """Counts of one file.

    Attributes:
        kind: what the file is, such as "JSONL" or "Parquet, gzipped".
        rows: number of rows with content.
        blank: number of lines and rows without content.
        examples: number of examples, those set apart for evaluation included.
        taken: number of examples of an epoch, repeated ones included; 0 for an evaluation file.
        shapes: number of lines of each shape ("messages", "prompt", …).
        dropped: number of lines that were dropped.
        repeated: number of examples with the content of an earlier one of the file.
        tokens: number of tokens of all examples.
        learned: number of these that are learned.
    """

    path: str
    kind: str
    rows: int
    blank: int
    examples: int
    taken: int
    shapes: Mapping[str, int]
    dropped: int
    repeated: int
    tokens: int
    learned: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of a data set's lines.

    Attributes:
        shapes: number of lines of each shape ("messages", "prompt", …) in all files.
        causes: "file:line" of dropped lines, by the cause. A cause completes the
            sentence "this line …".
        repeated: number of training lines with the content of an earlier one.
        leaked: "file:line" of evaluation lines whose content is in the training file too.
        divided: number of conversations that became several examples.
        ignored: keys that were ignored, with the number of times.
        left_out: what the chat template left out of conversations, with their number.
        files: counts of each file, in the order in which they were named.
    """

    train: Counts
    evaluation: Counts
    shapes: Mapping[str, int]
    causes: Mapping[str, tuple[str, ...]]
    repeated: int
    leaked: tuple[str, ...]
    divided: int
    ignored: Mapping[str, int]
    left_out: Mapping[str, int]
    files: tuple[FileCounts, ...]

    @property
    def dropped(self) -> tuple[str, ...]:
        """ "file:line" of all dropped lines."""
        return tuple(place for places in self.causes.values() for place in places)

    def notes(self, *, with_causes: bool = True) -> list[str]:
        """Returns sentences about what deserves attention; none if all is well.

        `with_causes` includes why lines were dropped.
        """
        notes = []
        for side, counts in (("training", self.train), ("evaluation", self.evaluation)):
            if counts.truncated:
                notes.append(
                    f"{counts.truncated:,} of {counts.examples:,} {side} examples were cut, by "
                    f"{counts.cut:,} tokens in all, so the model does not learn to stop after "
                    "them; raise max_length"
                )
        for cause, places in self.causes.items() if with_causes else ():
            notes.append(f"{_lines(len(places))} dropped; each {cause}: {_some(places)}")
        for what, count in self.left_out.items():
            notes.append(
                f"the chat template leaves out {what} of {count:,} conversations"
                + (", so these answers are not learned" if what == "tool calls" else "")
            )
        if self.leaked:
            notes.append(
                f"{len(self.leaked):,} evaluation lines are training lines too, so their loss "
                f"means little: {_some(self.leaked)}"
            )
        if self.repeated:
            notes.append(f"{self.repeated:,} training lines repeat earlier ones")
        if self.divided:
            notes.append(
                f"{self.divided:,} conversations became several examples, since the template "
                "renders earlier turns differently"
            )
        if blank := sum(file.blank for file in self.files):
            notes.append(f"{blank:,} blank lines were skipped")
        if self.ignored:
            keys = ", ".join(
                f'"{shown(key)}" ({self.ignored[key]:,})' for key in sorted(self.ignored)
            )
            notes.append(f"keys that were ignored: {keys}")
        return notes


def by_cause(dropped: Iterable[DroppedLine]) -> dict[str, tuple[str, ...]]:
    """Returns the places of lines by the cause, most frequent first."""
    found: dict[str, list[str]] = {}
    for line in dropped:
        found.setdefault(line.cause, []).append(line.place)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return {cause: tuple(places) for cause, places in ordered}


def causes_text(causes: Mapping[str, tuple[str, ...]]) -> str:
    """Returns causes with their numbers as one text."""
    return "; ".join(
        f"{_lines(len(places), '')}, each {cause} ({_some(places)})"
        for cause, places in causes.items()
    )


def too_long(max_length: int) -> str:
    """Returns the cause for lines without learned tokens within `max_length`."""
    return f"has no answer that starts within max_length={max_length} tokens; raise it"


def _lines(count: int, verb: str = "were") -> str:
    return f"{count:,} lines {verb}".strip()


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:5]) + (", …" if len(places) > 5 else "")
