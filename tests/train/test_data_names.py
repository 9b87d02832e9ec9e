"""Nulls are absent keys; columns and roles have the names that a file gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base.refusal import Refusal
from loraplex_training import data
from loraplex_training.data.prepare import RowNames, without_nulls
from loraplex_training.data.problems import Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.text import BaseText
from loraplex_training.spec.spec import DataSpec

from train.chat_bases import chat_base

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> BaseText:
    return chat_base(tmp_path_factory.mktemp("base")).text


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages(path: Path, *rows: dict[str, Any], **names: Any) -> list[list[Any]]:
    problems = Problems(strict=True)
    file = RecordFile(write(path, *rows), problems, names=RowNames(**names))
    found = [list(record.messages) for record in file]
    problems.check()
    return found


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {"instruction": "a", "input": None, "output": "b"},
            {"instruction": "a", "output": "b"},
        ),
        (
            {"messages": [USER | {"name": None, "tool_calls": None}, ANSWER | {"weight": None}]},
            {"messages": [USER, ANSWER]},
        ),
        ({"messages": [USER, ANSWER], "tools": None, "system": None}, {"messages": [USER, ANSWER]}),
        ({"prompt": "a", "completion": "b", "text": None}, {"prompt": "a", "completion": "b"}),
        ({"text": "a", "surely_unknown": None}, {"text": "a"}),
    ],
)
def test_a_null_is_an_absent_key(tmp_path: Path, row: dict[str, Any], same: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    assert messages(path, row) == messages(path, same)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": "a", "completion": None}, "completion"),
        ({"instruction": "a", "output": None}, "output"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content"),
    ],
)
def test_an_answer_that_is_null_is_refused_and_said_to_be_null(
    tmp_path: Path, row: dict[str, Any], key: str
) -> None:
    with pytest.raises(Refusal, match="null counts as absent") as caught:
        messages(tmp_path / "a.jsonl", row)
    assert caught.value.message.endswith(f'null counts as absent: "{key}"')


def test_nulls_of_a_calls_arguments_are_kept_but_in_tables() -> None:
    call = {"id": None, "function": {"name": "f", "arguments": {"city": None, "n": 1}}}
    row = {"role": "assistant", "content": None, "tool_calls": [call, None], "meta": {}}
    removed: list[str] = []
    assert without_nulls(row, removed=removed) == {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"city": None, "n": 1}}}, None],
        "meta": {},
    }
    assert removed == ["content", "tool_calls[0].id"]
    kept = without_nulls(row, ())
    assert kept["tool_calls"][0]["function"]["arguments"] == {"n": 1}


def test_nesting_is_bounded() -> None:
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"a": value}
    with pytest.raises(ValueError, match="nested too deeply"):
        without_nulls(value)


def test_columns_are_renamed_before_the_shape_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"q": "a", "a": "b"}, {"prompt": "c", "completion": "d"}]
    found = messages(path, *rows, columns={"prompt": "q", "completion": "a"})
    assert [[m["content"] for m in one] for one in found] == [["a", "b"], ["c", "d"]]
    [found] = messages(path, {"dialog": [USER, ANSWER]}, columns={"messages": "dialog"})
    assert found == [USER, ANSWER]
    swap = {"prompt": "completion", "completion": "prompt"}
    [found] = messages(path, {"prompt": "a", "completion": "b"}, columns=swap)
    assert [m["content"] for m in found] == ["b", "a"]
    kept = {"_level": "level"}
    assert messages(path, {"prompt": "a", "completion": "b", "level": 3}, columns=kept)


def test_a_key_that_is_there_under_both_names_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "a", "question": "b", "completion": "c"}
    with pytest.raises(Refusal, match='has "prompt" and "question"'):
        messages(tmp_path / "a.jsonl", row, columns={"prompt": "question"})


def test_roles_are_renamed(tmp_path: Path) -> None:
    row = {"messages": [USER | {"role": "Human"}, ANSWER | {"role": "bot"}]}
    roles = {"Human": "user", "bot": "assistant"}
    assert messages(tmp_path / "a.jsonl", row, roles=roles) == [[USER, ANSWER]]


def test_a_column_that_no_line_has_is_refused_with_those_that_exist(
    tmp_path: Path, text: BaseText
) -> None:
    path = write(tmp_path / "a.jsonl", *({"question": "a", "answer": "b"} for _ in range(200)))
    for columns in (
        {"prompt": "qestion", "completion": "answer"},
        {"prompt": "qestion", "completion": "anser"},
    ):
        with pytest.raises(Refusal) as caught:
            data.load(DataSpec(path, columns=columns), text)
        assert caught.value.reason == "CONFIG_INVALID"
        assert caught.value.field == "columns"
        assert "'qestion'" in caught.value.message
        assert "did you mean 'question'?" in caught.value.message
        assert "question, answer" in caught.value.message


def test_columns_may_be_those_of_one_of_several_files(tmp_path: Path, text: BaseText) -> None:
    one = write(tmp_path / "a.jsonl", {"q": "a", "completion": "b"})
    two = write(tmp_path / "b.jsonl", {"prompt": "c", "completion": "d"})
    spec = DataSpec((one, two), columns={"prompt": "q"}, eval_fraction=0)
    assert len(data.load(spec, text).train) == 2


def test_a_shape_that_is_given_ignores_and_counts_the_keys_of_others(
    tmp_path: Path, text: BaseText
) -> None:
    rows = [{"prompt": f"a{i}", "completion": "b", "text": "c", "level": 1} for i in range(3)]
    path = write(tmp_path / "a.jsonl", *rows)
    loaded = data.load(DataSpec(path, shape="prompt", eval_fraction=0), text)
    assert loaded.report.shapes == {"prompt": 3}
    assert loaded.report.ignored == {"text": 3, "level": 3}
    loaded = data.load(DataSpec(path, shape="text", eval_fraction=0), text)
    assert loaded.report.shapes == {"text": 3}
    with pytest.raises(Refusal, match="did you mean 'prompt'") as caught:
        data.load(DataSpec(path, shape="promt"), text)
    assert caught.value.reason == "CONFIG_INVALID"
    with pytest.raises(Refusal, match='has no "messages"'):
        data.load(DataSpec(path, shape="messages"), text)
