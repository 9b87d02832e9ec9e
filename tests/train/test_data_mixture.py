"""Several files: each example is in every epoch, and weights are the files' shares of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_model.base.refusal import Refusal
from loraplex_training import data
from loraplex_training.data.mixture import MOST_REPEATS, combined, mixed
from loraplex_training.data.show import report
from loraplex_training.data.text import BaseText
from loraplex_training.spec.spec import DataSpec
from rich.console import Console

from train.chat_bases import chat_base


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> BaseText:
    return chat_base(tmp_path_factory.mktemp("base")).text


@dataclass(frozen=True)
class Hashed:
    file: int
    digest: bytes


def files_of(sizes: list[int]) -> list[list[Hashed]]:
    return [[Hashed(at, bytes([at, i])) for i in range(n)] for at, n in enumerate(sizes)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(word: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i}?", "completion": f"{word} {i}"} for i in range(count)]


def test_without_weights_each_example_is_taken_once() -> None:
    files = files_of([3, 1, 2])
    assert mixed(files, ()) == [*files[0], *files[1], *files[2]]


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0.5, 10)), min_size=1, max_size=4))
def test_shares_follow_the_weights_and_nothing_is_left_out(given: list[tuple[int, float]]) -> None:
    files = files_of([size for size, _ in given])
    weights = [weight for _, weight in given]
    made = mixed(files, weights)
    counts = Counter(made)
    assert counts.keys() == {example for file in files for example in file}
    per_file = Counter(example.file for example in made)
    units = [per_file[at] / w for at, w in enumerate(weights) if per_file[at]]
    # Rounding is at most half an example of each file.
    bound = [0.5 / w for at, w in enumerate(weights) if per_file[at]]
    for a, unit in zip(bound, units, strict=True):
        assert max(units) - unit <= a + max(bound) + 1e-9
    for file in files:
        taken = [counts[example] for example in file]
        assert not taken or max(taken) - min(taken) <= 1


def test_the_repeated_examples_are_those_with_the_lowest_digests() -> None:
    small, large = files_of([4, 10])
    made = mixed([small[::-1], large], [0.6, 1.0])
    assert [e.digest[1] for e in made if e.file == 0] == [3, 2, 1, 1, 0, 0]


def test_an_example_is_not_repeated_without_bounds() -> None:
    files = files_of([1, 200])
    with pytest.raises(ValueError, match=f"more than {MOST_REPEATS:,}"):
        mixed(files, [1000.0, 1.0])


def test_the_digest_of_several_files_depends_on_files_order_and_weights() -> None:
    assert combined(["a"], ()) == combined(["a"], [2.0]) == "a"
    digests = {
        combined(*given)
        for given in (
            (["a", "b"], ()), (["b", "a"], ()), (["a", "b"], [1.0, 2.0]), (["a", "b"], [2.0, 1.0]),
        )
    }  # fmt: skip
    assert len(digests) == 4
    assert combined(["a", "b"], [1.0, 1.0]) == combined(["a", "b"], ())


def test_several_files_are_one_data_set(tmp_path: Path, text: BaseText) -> None:
    one, two = write(tmp_path / "a.jsonl", rows("a", 12)), write(tmp_path / "b.jsonl", rows("b", 4))
    whole = write(tmp_path / "c.jsonl", rows("a", 12) + rows("b", 4))
    spec = DataSpec((one, two))
    loaded = data.load(spec, text)
    alone = data.load(DataSpec(whole), text)
    assert [s.tokens for s in loaded.train] == [s.tokens for s in alone.train]
    assert [s.tokens for s in loaded.evaluation] == [s.tokens for s in alone.evaluation]
    weighted = data.load(replace(spec, weights=(0.5, 0.5), eval_fraction=0), text)
    words = Counter(sample.reference.strip()[0] for sample in weighted.train)
    assert words == {"a": 12, "b": 12}
    assert weighted.digest != loaded.digest
    assert [(f.kind, f.examples, f.taken) for f in weighted.report.files] == [
        ("JSONL", 12, 12),
        ("JSONL", 4, 12),
    ]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(report(weighted.report))
    assert f"{two}: JSONL, 4 examples, 50.0% of an epoch" in shown.get()


def test_what_is_set_apart_is_in_no_repeat(tmp_path: Path, text: BaseText) -> None:
    one, two = write(tmp_path / "a.jsonl", rows("a", 30)), write(tmp_path / "b.jsonl", rows("b", 9))
    loaded = data.load(DataSpec((one, two), eval_fraction=0.3, weights=(1.0, 3.0)), text)
    held = [sample.reference for sample in loaded.evaluation]
    assert len(held) == len(set(held)) == 12
    assert not set(held) & {sample.reference for sample in loaded.train}


def test_every_unreadable_file_is_named_at_once(tmp_path: Path, text: BaseText) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    two.write_bytes(b"%PDF-1.7")
    with pytest.raises(Refusal) as caught:
        data.load(DataSpec((one, two), two), text)
    assert caught.value.reason == "DATA_INVALID"
    assert len(caught.value.messages) == 3
    assert [problem.field for problem in caught.value.problems] == ["data", "data", "eval_data"]


def test_too_many_repeats_are_a_problem_of_the_weights(tmp_path: Path, text: BaseText) -> None:
    one, two = write(tmp_path / "a.jsonl", rows("a", 2)), write(tmp_path / "b.jsonl", rows("b", 30))
    with pytest.raises(Refusal) as caught:
        data.load(DataSpec((one, two), weights=(1000.0, 1.0), eval_fraction=0), text)
    assert caught.value.reason == "CONFIG_INVALID"
    assert caught.value.field == "data_weights"
