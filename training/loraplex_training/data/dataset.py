"""A data set: files read, tokenised and divided. Equal bytes give an equal data set anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.format.strict_json import shown
from loraplex_model.base.names import suggest
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.chat import TextRefused

from loraplex_training.data.mixture import combined, mixed
from loraplex_training.data.prepare import RowNames
from loraplex_training.data.problems import Dropped, Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.report import (
    Counts,
    DataReport,
    FileCounts,
    by_cause,
    causes_text,
    too_long,
)
from loraplex_training.data.samples import Sample
from loraplex_training.data.shapes import SHAPES, DataRecord
from loraplex_training.data.text import BaseText
from loraplex_training.data.tokenise import Tokeniser
from loraplex_training.spec.parse import problems_of
from loraplex_training.spec.spec import DataSpec


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
    problems = Problems(spec.strict)
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
    report = DataReport(
        train=Counts.of(learned),
        evaluation=Counts.of(held),
        shapes=_sum(file.shapes for file in files),
        causes=by_cause(problems.dropped),
        repeated=len(examples) - len({example.digest for example in examples}),
        leaked=tuple(leaked),
        divided=sum(len(e.samples) > 1 for file in files for e in file.examples),
        ignored=_sum(file.ignored for file in files),
        left_out=_sum(file.left_out for file in files),
        files=_counts(files, Counter(example.path for example in train), problems),
    )
    digest = combined([file.digest for file in main], spec.weights)
    return Dataset(learned, held, digest, others[0].digest if others else "", report)


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _counts(
    files: Sequence[_File], taken: Mapping[Path, int], problems: Problems
) -> tuple[FileCounts, ...]:
    """Returns the counts of each file; `taken` are the examples of an epoch by file."""
    dropped = Counter(line.path for line in problems.dropped)
    return tuple(
        FileCounts(
            path=str(file.path),
            kind=file.kind,
            rows=file.rows,
            blank=file.blank,
            examples=len(file.examples),
            taken=taken.get(file.path, 0),
            shapes=dict(file.shapes),
            dropped=dropped[file.path],
            repeated=len(file.examples) - len({example.digest for example in file.examples}),
            tokens=sum(len(s.tokens) for e in file.examples for s in e.samples),
            learned=sum(sum(s.learned) for e in file.examples for s in e.samples),
        )
        for file in files
    )


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
            causes = by_cause(line for line in problems.dropped if line.path == file.path)
            raise Refusal(
                Reason.DATA_INVALID,
                f"{file.path}: no line is left to learn from: {causes_text(causes)}",
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
        self.shapes: Counter[str] = Counter()
        self.refusal: Refusal | None = None
        self._text = text
        self._too_long = too_long(spec.max_length)
        tokeniser = Tokeniser(text, spec.max_length, spec.learn, spec.system, spec.strict)
        names = RowNames(spec.columns, spec.roles)
        file = RecordFile(path, problems, field, names, spec.shape)
        try:
            for record in file:
                self._add(record, tokeniser, problems)
        except Refusal as error:
            self.refusal = error
        self.digest, self.kind = file.digest, file.kind
        self.rows, self.blank = file.rows, file.blank
        self.keys, self.ignored = file.keys, file.ignored
        self.left_out = tokeniser.left_out

    def _add(self, record: DataRecord, tokeniser: Tokeniser, problems: Problems) -> None:
        try:
            samples = tokeniser.samples(record)
        except Dropped as error:
            problems.drop(self.path, record.line, error, self.field)
        except TextRefused as error:
            refused = Dropped(f"cannot be rendered: {shown(str(error), 300)}")
            problems.drop(self.path, record.line, refused, self.field)
        except ValueError as error:
            problems.add(self.path, record.line, str(error), self.field)
        else:
            self.shapes[record.shape] += 1
            if samples:
                self.examples.append(_Example(record.digest(), self.path, record.line, samples))
            else:
                problems.drop_always(self.path, record.line, self._too_long)


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
