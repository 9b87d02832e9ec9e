"""A data set is a function of bytes; what is set apart is never learned from."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Refusal
from loraplex_training import data
from loraplex_training.data.samples import Sample
from loraplex_training.data.text import BaseText
from loraplex_training.spec.spec import DataSpec

from train.chat_bases import FORGETFUL, chat_base


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> BaseText:
    return chat_base(tmp_path_factory.mktemp("base")).text


def lines(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"what is {i}?", "completion": f"the {i}"} for i in range(count)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


def texts(samples: tuple[Sample, ...]) -> set[str]:
    return {sample.reference for sample in samples}


def test_the_choice_does_not_depend_on_the_order_of_lines(tmp_path: Path, text: BaseText) -> None:
    content = lines(50)
    spec = DataSpec(write(tmp_path / "a.jsonl", content))
    one = data.load(spec, text)
    random.Random(1).shuffle(content)
    other = data.load(replace(spec, path=write(tmp_path / "b.jsonl", content)), text)
    assert texts(one.evaluation) == texts(other.evaluation)
    assert len(one.evaluation) == 5
    assert one.digest != other.digest
    assert [s.line for s in one.train] != list(range(1, 46))  # not simply the last lines
    # a fixed case: another machine, another day
    assert texts(one.evaluation) == {"the 9", "the 14", "the 20", "the 28", "the 48"}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=20), st.floats(0.001, 0.999))
def test_at_least_one_is_set_apart_never_all_and_nothing_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, text: BaseText, which: list[int], fraction: float
) -> None:
    path = write(
        tmp_path_factory.getbasetemp() / "split.jsonl", [lines(9)[number] for number in which]
    )
    spec = DataSpec(path, eval_fraction=fraction)
    if len(set(which)) == 1:
        with pytest.raises(Refusal, match="cannot be divided"):
            data.load(spec, text)
        return
    loaded = data.load(spec, text)
    assert loaded.train
    assert loaded.evaluation
    assert not texts(loaded.train) & texts(loaded.evaluation)
    assert len(loaded.train) + len(loaded.evaluation) == len(which)
    assert loaded.report.repeated == len(which) - len(set(which))


def test_without_a_fraction_all_is_learned(tmp_path: Path, text: BaseText) -> None:
    spec = DataSpec(write(tmp_path / "a.jsonl", lines(3)), eval_fraction=0)
    loaded = data.load(spec, text)
    assert [s.line for s in loaded.train] == [1, 2, 3]
    assert loaded.evaluation == ()


def test_a_file_to_evaluate_on_is_taken_whole_and_what_both_hold_is_told(
    tmp_path: Path, text: BaseText
) -> None:
    path = write(tmp_path / "a.jsonl", lines(10))
    other = write(
        tmp_path / "b.jsonl",
        [*lines(12)[9:], {"instruction": "what is 3?", "output": "the 3", "id": 1}],
    )
    loaded = data.load(DataSpec(path, other), text)
    assert (len(loaded.train), len(loaded.evaluation)) == (10, 4)
    assert loaded.report.leaked == (f"{other}:1", f"{other}:4")
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.eval_digest == hashlib.sha256(other.read_bytes()).hexdigest()
    notes = " ".join(loaded.report.notes())
    assert "2 evaluation lines are training lines too" in notes
    assert '"id"' in notes


def test_the_report_counts(tmp_path: Path, text: BaseText) -> None:
    content = [*lines(4), {"text": "the quick brown fox"}, {"prompt": "x" * 300, "completion": "y"}]
    path = write(tmp_path / "a.jsonl", content)
    longest = max(len(s.tokens) for s in data.load(DataSpec(path, eval_fraction=0), text).train[:4])
    loaded = data.load(DataSpec(path, eval_fraction=0, max_length=longest - 1), text)
    counts = loaded.report.train
    assert loaded.report.shapes == {"prompt": 5, "text": 1}
    assert loaded.report.dropped == (f"{path}:6",)
    assert counts.examples == len(loaded.train) == 5
    assert counts.tokens == sum(len(s.tokens) for s in loaded.train)
    assert counts.learned == sum(sum(s.learned) for s in loaded.train)
    assert counts.longest == longest - 1
    assert counts.truncated == sum(s.truncated > 0 for s in loaded.train) > 0
    assert counts.cut == counts.truncated  # one token each
    notes = " ".join(loaded.report.notes())
    assert "does not learn to stop" in notes
    assert "1 lines were dropped" in notes
    assert data.load(DataSpec(path, eval_fraction=0), text).report.notes() == []


def test_divided_conversations_stay_on_one_side(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", FORGETFUL)
    talk = [
        {"role": role, "content": content}
        for role, content in [
            ("user", "a"),
            ("assistant", "<think>b</think>c"),
            ("user", "d"),
            ("assistant", "e"),
        ]
    ]
    content = [{"messages": [{"role": "user", "content": f"{i}"}, *talk[1:]]} for i in range(6)]
    loaded = data.load(DataSpec(write(tmp_path / "a.jsonl", content), eval_fraction=0.5), base.text)
    assert (len(loaded.train), len(loaded.evaluation)) == (6, 6)
    assert not {s.line for s in loaded.train} & {s.line for s in loaded.evaluation}
    assert loaded.report.divided == 6


def test_bad_lines_of_both_files_are_told_at_once(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", None)
    messages = {"messages": [{"role": "assistant", "content": "a"}]}
    one = write(tmp_path / "a.jsonl", [{"text": ""}, messages, *lines(2)])
    other = write(tmp_path / "b.jsonl", [{"prompt": "a"}])
    with pytest.raises(Refusal) as caught:
        data.load(DataSpec(one, other, strict=True), base.text)
    assert caught.value.reason == "DATA_INVALID"
    assert [problem.split(": ")[0] for problem in caught.value.messages] == [
        f"{one}:1",
        f"{one}:2",
        f"{other}:1",
    ]
    assert "no chat template" in caught.value.messages[1]


def test_lines_that_the_template_refuses_are_left_out_or_bad_if_strict(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}x"
    )
    base = chat_base(tmp_path / "base", template)
    path = write(tmp_path / "a.jsonl", lines(2))
    with pytest.raises(Refusal) as caught:
        data.load(DataSpec(path, system="Be brief", strict=True), base.text)
    assert [p.endswith("chat template refuses: no system") for p in caught.value.messages] == [
        True,
        True,
    ]
    with pytest.raises(Refusal) as caught:
        data.load(DataSpec(path, system="Be brief"), base.text)
    assert caught.value.reason == "DATA_INVALID"
    assert caught.value.message == (
        f"{path}: no line is left to learn from: 2 lines, each cannot be rendered: the model's "
        f"chat template refuses: no system ({path}:1, {path}:2)"
    )
    path = write(path, [*lines(2), {**lines(3)[2], "system": "Be brief"}])
    loaded = data.load(DataSpec(path, eval_fraction=0), base.text)
    assert [sample.line for sample in loaded.train] == [1, 2]
    assert loaded.report.dropped == (f"{path}:3",)


def test_wrong_options_are_told_at_once(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", None)
    with pytest.raises(Refusal) as caught:
        data.load(
            DataSpec(tmp_path / "a", learn="some", max_length=1, eval_fraction=1.0, system="x"),
            base.text,
        )
    assert caught.value.reason == "CONFIG_INVALID"
    assert len(caught.value.messages) == 4


def test_when_nothing_is_left_the_option_to_raise_is_named(tmp_path: Path, text: BaseText) -> None:
    path = write(tmp_path / "a.jsonl", lines(2))
    with pytest.raises(Refusal, match="max_length=3"):
        data.load(DataSpec(path, max_length=3), text)
