"""A data set: files read, tokenised and divided; the same bytes give the same one anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.chat import TextRefused

from loraplex_training.data.problems import Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.samples import Sample
from loraplex_training.data.text import BaseText
from loraplex_training.data.tokenise import Tokeniser
from loraplex_training.spec.parse import problems_of
from loraplex_training.spec.spec import DataSpec


@dataclass(frozen=True, slots=True)
class Counts:
    """What one side of a data set holds; `cut` tokens were lost of `truncated` examples."""

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
class Report:
    """What became of the files.

    Attributes:
        shapes: lines of each shape ("messages", "prompt", …), both files together.
        dropped: "file:line" of lines whose answers all lie behind `max_length`.
        repeated: lines of the training file that say what an earlier one says.
        leaked: "file:line" of lines of the evaluation file that are in the training file too.
        divided: conversations that became several examples.
        ignored: keys that were ignored, and how often.
    """

    train: Counts
    evaluation: Counts
    shapes: Mapping[str, int]
    dropped: tuple[str, ...]
    repeated: int
    leaked: tuple[str, ...]
    divided: int
    ignored: Mapping[str, int]

    def notes(self) -> list[str]:
        """Sentences on what a person should know; empty if all is well."""
        said = []
        for side, counts in (("training", self.train), ("evaluation", self.evaluation)):
            if counts.truncated:
                said.append(
                    f"{counts.truncated:,} of {counts.examples:,} {side} examples were cut, by "
                    f"{counts.cut:,} tokens in all, and do not learn to stop; raise max_length"
                )
        if self.dropped:
            said.append(
                f"{len(self.dropped):,} lines were left out, as their answers begin behind "
                f"max_length: {_some(self.dropped)}"
            )
        if self.leaked:
            said.append(
                f"{len(self.leaked):,} evaluation lines are training lines too, so their loss "
                f"says little: {_some(self.leaked)}"
            )
        if self.repeated:
            said.append(f"{self.repeated:,} training lines repeat earlier ones")
        if self.divided:
            said.append(
                f"{self.divided:,} conversations became several examples, since the template "
                "writes earlier turns differently"
            )
        if self.ignored:
            keys = ", ".join(f'"{key}"' for key in sorted(self.ignored))
            said.append(f"keys that were ignored: {keys}")
        return said


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples, those to learn from and those set apart.

    Attributes:
        evaluation: () if `eval_fraction` is 0 and there is no file.
        digest, eval_digest: SHA-256 (hex) of the files' bytes; "" where there is no file.
    """

    train: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]
    digest: str
    eval_digest: str
    report: Report


def load(spec: DataSpec, text: BaseText) -> Dataset:
    """Reads what a job learns from.

    Raises:
        Refusal: DATA_INVALID with every bad line of both files; CONFIG_INVALID for an option.
    """
    _check(spec, text)
    problems = Problems()
    main = _File(spec.path, spec, text, problems)
    other = _File(spec.eval_path, spec, text, problems) if spec.eval_path else None
    problems.check()
    for file in [main, other] if other else [main]:
        if not file.examples:
            raise Refusal(
                Reason.DATA_INVALID,
                f"{file.path}: no answer begins within max_length={spec.max_length} tokens; "
                "raise it",
            )
    leaked: list[str] = []
    train = main.examples
    if other:
        evaluation = other.examples
        known = {example.digest for example in train}
        leaked = [f"{other.path}:{e.line}" for e in evaluation if e.digest in known]
    else:
        apart = _set_apart({example.digest for example in train}, spec)
        evaluation = [example for example in train if example.digest in apart]
        train = [example for example in train if example.digest not in apart]
    learned, held = _samples(train), _samples(evaluation)
    files = [main, other] if other else [main]
    report = Report(
        Counts.of(learned),
        Counts.of(held),
        dict(sum((file.shapes for file in files), Counter())),
        tuple(place for file in files for place in file.dropped),
        len(main.examples) - len({example.digest for example in main.examples}),
        tuple(leaked),
        sum(len(e.samples) > 1 for file in files for e in file.examples),
        dict(sum((file.ignored for file in files), Counter())),
    )
    return Dataset(learned, held, main.digest, other.digest if other else "", report)


@dataclass(frozen=True, slots=True)
class _Example:
    digest: bytes
    line: int
    samples: Sequence[Sample]


class _File:
    """A file's good lines as samples."""

    def __init__(self, path: Path, spec: DataSpec, text: BaseText, problems: Problems) -> None:
        tokeniser = Tokeniser(text, spec.max_length, spec.learn, spec.system)
        file = RecordFile(path, problems)
        self.path = path
        self.examples: list[_Example] = []
        self.dropped: list[str] = []
        self.shapes: Counter[str] = Counter()
        for record in file:
            try:
                samples = tokeniser.samples(record)
            except (TextRefused, ValueError) as error:
                problems.add(path, record.line, str(error))
                continue
            self.shapes[record.shape] += 1
            if samples:
                self.examples.append(_Example(record.digest(), record.line, samples))
            else:
                self.dropped.append(f"{path}:{record.line}")
        self.digest = file.digest
        self.ignored = file.ignored


def _check(spec: DataSpec, text: BaseText) -> None:
    problems = problems_of(spec)
    if spec.system is not None and not text.has_template:
        message = "a system message needs a chat template, and the base model has none"
        problems.append(Problem("system", message))
    if problems:
        raise Refusal.listing(Reason.CONFIG_INVALID, problems)


def _set_apart(digests: set[bytes], spec: DataSpec) -> set[bytes]:
    """Those with the lowest hashes: at least one, never all, whatever the order of the lines.

    Lines that say the same have one hash, so none is on both sides.
    """
    if spec.eval_fraction == 0:
        return set()
    if len(digests) < 2:
        raise Refusal(
            Reason.DATA_INVALID,
            f"{spec.path}: one example cannot be divided into training and evaluation; give more, "
            "or an evaluation file, or set eval_fraction to 0",
        )
    count = min(max(1, round(spec.eval_fraction * len(digests))), len(digests) - 1)
    return set(sorted(digests)[:count])


def _samples(examples: Sequence[_Example]) -> tuple[Sample, ...]:
    return tuple(sample for example in examples for sample in example.samples)


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:5]) + (", …" if len(places) > 5 else "")
