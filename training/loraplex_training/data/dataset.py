"""A data set: files read, tokenised and divided. Equal bytes give an equal data set anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.format.strict_json import shown
from loraplex_model.base.names import suggest
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.chat import TextRefused

from loraplex_training.data.mixture import combined, mixed
from loraplex_training.data.prepare import RowNames
from loraplex_training.data.problems import Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.samples import Sample
from loraplex_training.data.shapes import SHAPES, DataRecord
from loraplex_training.data.text import BaseText
from loraplex_training.data.tokenise import Tokeniser
from loraplex_training.spec.parse import problems_of
from loraplex_training.spec.spec import DataSpec


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
    """

    path: str
    kind: str
    rows: int
    blank: int
    examples: int
    taken: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of a data set's lines.

    Attributes:
        shapes: number of lines of each shape ("messages", "prompt", …) in both files.
        dropped: "file:line" of lines whose answers all start beyond `max_length`.
        repeated: number of training lines with the content of an earlier one.
        leaked: "file:line" of evaluation lines whose content is in the training file too.
        divided: number of conversations that became several examples.
        ignored: keys that were ignored, with the number of times.
        files: counts of each file, in the order in which they were named.
    """

    train: Counts
    evaluation: Counts
    shapes: Mapping[str, int]
    dropped: tuple[str, ...]
    repeated: int
    leaked: tuple[str, ...]
    divided: int
    ignored: Mapping[str, int]
    files: tuple[FileCounts, ...]

    def notes(self) -> list[str]:
        """Returns sentences about what deserves attention; none if all is well."""
        notes = []
        for side, counts in (("training", self.train), ("evaluation", self.evaluation)):
            if counts.truncated:
                notes.append(
                    f"{counts.truncated:,} of {counts.examples:,} {side} examples were cut, by "
                    f"{counts.cut:,} tokens in all, and do not teach to stop; raise max_length"
                )
        if self.dropped:
            notes.append(
                f"{len(self.dropped):,} lines were dropped, since their answers start beyond "
                f"max_length: {_some(self.dropped)}"
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
            keys = ", ".join(f'"{key}"' for key in sorted(self.ignored))
            notes.append(f"keys that were ignored: {keys}")
        return notes


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training and evaluation examples.

    Attributes:
        evaluation: empty if `eval_fraction` is 0 and there is no evaluation file.
        digest: SHA-256 (hex) of the training file; of the digests and weights of several.
        eval_digest: SHA-256 (hex) of the evaluation file, or "".
    """

    train: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]
    digest: str
    eval_digest: str
    report: DataReport


def load(spec: DataSpec, text: BaseText) -> Dataset:
    """Reads, tokenises and divides a job's examples.

    Raises:
        Refusal: DATA_INVALID with every bad line of all files; CONFIG_INVALID for an option.
    """
    _check(spec, text)
    problems = Problems()
    given = [("data", path) for path in spec.paths]
    given += [("eval_data", spec.eval_path)] if spec.eval_path else []
    files = [_File(field, path, spec, text, problems) for field, path in given]
    _check_files(files, spec, problems)
    main, others = files[: len(spec.paths)], files[len(spec.paths) :]
    leaked: list[str] = []
    examples = [example for file in main for example in file.examples]
    if others:
        [other] = others
        evaluation = other.examples
        known = {example.digest for example in examples}
        leaked = [f"{other.path}:{e.line}" for e in evaluation if e.digest in known]
        apart: set[bytes] = set()
    else:
        apart = _set_apart({example.digest for example in examples}, spec)
        evaluation = [example for example in examples if example.digest in apart]
    kept = [[e for e in file.examples if e.digest not in apart] for file in main]
    try:
        train = mixed(kept, spec.weights)
    except ValueError as error:
        raise Refusal(Reason.CONFIG_INVALID, str(error), field="data_weights") from None
    learned, held = (
        tuple(sample for example in side for sample in example.samples)
        for side in (train, evaluation)
    )
    taken = Counter(example.path for example in train)
    report = DataReport(
        Counts.of(learned),
        Counts.of(held),
        dict(sum((file.shapes for file in files), Counter())),
        tuple(place for file in files for place in file.dropped),
        len(examples) - len({example.digest for example in examples}),
        tuple(leaked),
        sum(len(e.samples) > 1 for file in files for e in file.examples),
        dict(sum((file.ignored for file in files), Counter())),
        tuple(
            FileCounts(str(f.path), f.kind, f.rows, f.blank, len(f.examples), taken[f.path])
            for f in files
        ),
    )
    digest = combined([file.digest for file in main], spec.weights)
    return Dataset(learned, held, digest, others[0].digest if others else "", report)


def _check_files(files: Sequence[_File], spec: DataSpec, problems: Problems) -> None:
    """Raises Refusal for what is wrong with the files as a whole, then for all bad lines."""
    keys = Counter[str](key for file in files for key in file.keys)
    for column in spec.columns.values() if all(file.keys for file in files) else ():
        if column not in keys:
            there = ", ".join(shown(key, 40) for key in list(keys)[:12])
            near = suggest(column, keys)
            raise Refusal(
                Reason.CONFIG_INVALID,
                f"columns names {shown(column, 40)!r}, which no line of the data has{near}; there "
                f"are: {there}",
                field="columns",
            )
    if refused := [file.refusal for file in files if file.refusal]:
        listed = [problem for one in refused for problem in one.problems]
        raise Refusal.listing(Reason.DATA_INVALID, listed)
    problems.check()
    for file in files:
        if not file.examples:
            raise Refusal(
                Reason.DATA_INVALID,
                f"{file.path}: no answer starts within max_length={spec.max_length} tokens; "
                "raise it",
                field=file.field,
            )


@dataclass(frozen=True, slots=True)
class _Example:
    digest: bytes
    path: Path
    line: int
    samples: Sequence[Sample]


class _File:
    """The valid lines of a file as samples. `field` is the option that names the file.

    `refusal` says why the file cannot be read, or is None.
    """

    def __init__(
        self, field: str, path: Path, spec: DataSpec, text: BaseText, problems: Problems
    ) -> None:
        self.field = field
        self.path = path
        self.examples: list[_Example] = []
        self.dropped: list[str] = []
        self.shapes: Counter[str] = Counter()
        self.refusal: Refusal | None = None
        tokeniser = Tokeniser(text, spec.max_length, spec.learn, spec.system)
        names = RowNames(spec.columns, spec.roles)
        file = RecordFile(path, problems, field, names, spec.shape)
        try:
            for record in file:
                self._add(record, tokeniser, problems)
        except Refusal as error:
            self.refusal = error
        self.dropped += [f"{path}:{number}" for number, _ in file.dropped]
        self.digest, self.kind = file.digest, file.kind
        self.rows, self.blank = file.rows, file.blank
        self.keys, self.ignored = file.keys, file.ignored

    def _add(self, record: DataRecord, tokeniser: Tokeniser, problems: Problems) -> None:
        try:
            samples = tokeniser.samples(record)
        except (TextRefused, ValueError) as error:
            problems.add(self.path, record.line, str(error), self.field)
            return
        self.shapes[record.shape] += 1
        if samples:
            self.examples.append(_Example(record.digest(), self.path, record.line, samples))
        else:
            self.dropped.append(f"{self.path}:{record.line}")


def _check(spec: DataSpec, text: BaseText) -> None:
    problems = problems_of(spec)
    if spec.system is not None and not text.has_template:
        message = "a system message needs a chat template, and the base model has none"
        problems.append(Problem("system", message))
    if spec.shape and spec.shape not in SHAPES:
        near = suggest(spec.shape, SHAPES)
        message = f"shape is {spec.shape!r}; it should be one of {', '.join(SHAPES)}{near}"
        problems.append(Problem("shape", message))
    if problems:
        raise Refusal.listing(Reason.CONFIG_INVALID, problems)


def _set_apart(digests: set[bytes], spec: DataSpec) -> set[bytes]:
    """Returns the digests of the evaluation examples: the lowest ones, at least one, never all.

    The order of lines has no influence, and lines of equal content are on the same side.
    """
    if spec.eval_fraction == 0:
        return set()
    if len(digests) < 2:
        raise Refusal(
            Reason.DATA_INVALID,
            f"{spec.paths[0]}: one example cannot be divided into training and evaluation; add "
            "more, name an evaluation file, or set eval_fraction to 0",
            field="data",
        )
    count = min(max(1, round(spec.eval_fraction * len(digests))), len(digests) - 1)
    return set(sorted(digests)[:count])


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:5]) + (", …" if len(places) > 5 else "")
