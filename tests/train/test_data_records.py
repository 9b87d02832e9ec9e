"""Every bad line is told, with its reason; good ones mean what they say."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Refusal
from loraplex_training.data import records
from loraplex_training.data.problems import SHOWN, Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.shapes import DataRecord

GOOD = b'{"prompt": "a", "completion": "b"}'
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(path: Path, content: bytes) -> list[DataRecord]:
    """Raises Refusal with everything that is wrong, lines that are left out included."""
    path.write_bytes(content)
    problems = Problems(strict=True)
    found = list(RecordFile(path, problems))
    problems.check()
    return found


def reasons(path: Path, content: bytes) -> list[str]:
    with pytest.raises(Refusal) as caught:
        read(path, content)
    assert caught.value.reason == "DATA_INVALID"
    return list(caught.value.messages)


BAD: list[tuple[Any, str]] = [
    (b"{", "is not JSON"),
    (b"nonsense", "is not JSON"),
    (b"{'prompt': 1}", "is not JSON"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"text": "a", "text": "b"}', "the key text twice"),
    (b'{"text": NaN}', "contains NaN"),
    (b'{"text": 1e999}', "too large"),
    (b'{"a": ' * 100_000, "nested too deeply"),
    (b'[{"text": "a"}]', "is a JSON list; write one object on each line"),
    (b'{"text": "\\ud800"}', "half a surrogate"),
    ("a", "is a string, not an object"),
    (None, "is null, not an object"),
    (3, "is a number, not an object"),
    ({}, "holds nothing"),
    ({"id": 1}, 'holds "id"; it must be one of'),
    ({"q": "a", "a": "b"}, "name its keys, as in --columns prompt=q,completion=a"),
    ({"text": "a", "prompt": "b"}, 'mixes shapes ("prompt", "text")'),
    ({"instruction": "a", "output": "b", "text": "c"}, "mixes shapes"),
    ({"messages": [USER, ANSWER], "text": "c"}, '"text" is not a copy of them; choose one with'),
    ({"messages": [USER, ANSWER], "prompt": "c"}, "is not the beginning of"),
    ({"messages": [USER, ANSWER], "output": "c"}, 'mixes shapes ("messages", "output")'),
    ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "mixes shapes"),
    ({"text": "a", "weight": 2}, 'unknown keys: "weight"'),
    ({"instruction": "a", "output": "b", "histroy": []}, "did you mean 'history'"),
    ({"text": "a", "\u202eevil\n": 2}, 'unknown keys: "\\u202eevil\\n"'),
    ({"prompt": "a"}, 'has no "completion"'),
    ({"completion": "a"}, 'has no "prompt"'),
    ({"instruction": "a", "input": "b"}, 'has no "output"'),
    ({"text": ""}, "text is empty"),
    ({"text": 3}, "text is a number, not a string"),
    ({"text": None}, "holds nothing; it must be one of"),
    ({"text": None}, 'null counts as absent: "text"'),
    ({"text": ["a"]}, "text is a list, not a string"),
    ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    ({"prompt": "", "completion": "a"}, "prompt is empty"),
    ({"prompt": "a", "completion": {}}, "completion is an object, not a string"),
    ({"prompt": [USER], "context": "c", "completion": "b"}, "beside a list of messages"),
    ({"prompt": [USER], "completion": [USER]}, 'completion begins with the role "user"'),
    ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
    ({"prompt": [USER], "completion": []}, "completion is empty"),
    ({"instruction": "a", "input": 1, "output": "b"}, "input is a number"),
    ({"instruction": "a", "output": None}, 'no "output"; null counts as absent: "output"'),
    ({"instruction": "a", "output": ""}, "output is empty"),
    ({"messages": "a"}, "messages is a string, not a list"),
    ({"messages": []}, "messages is empty"),
    ({"messages": ["a"]}, "messages[0] is a string, not an object"),
    ({"messages": [USER]}, 'ends with a message of the role "user"'),
    ({"messages": [{"role": "user"}, ANSWER]}, 'messages[0] has no "content"'),
    ({"messages": [{"content": "a"}, ANSWER]}, 'messages[0] has no "role"'),
    ({"messages": [USER, {"role": "bot", "content": "a"}]}, 'messages[1] has the role "bot"'),
    ({"messages": [USER, {"role": 1, "content": "a"}]}, "messages[1].role is a number"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, 'absent: "messages[1].content"'),
    ({"messages": [USER, {**ANSWER, "tool_call": []}]}, 'unknown key "tool_call"'),
    ({"messages": [USER, {"role": "system", "content": "a"}, ANSWER]}, "not the first one"),
]


def encoded(line: Any) -> bytes:
    return line if isinstance(line, bytes) else json.dumps(line).encode()


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_told_with_file_line_and_reason(
    tmp_path: Path, line: Any, reason: str
) -> None:
    path = tmp_path / "data.jsonl"
    [problem] = reasons(path, b"\n".join([GOOD, encoded(line), GOOD]))
    assert problem.startswith(f"{path}:2: ")
    assert reason in problem
    assert problem.isprintable()


def test_lines_without_content_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + GOOD + b"\n\n \t\r\n" + GOOD + b"\n\n")
    problems = Problems()
    file = RecordFile(path, problems)
    assert [record.line for record in file] == [2, 5]
    problems.check()
    assert (file.rows, file.blank) == (2, 4)
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "has only blank lines" in reasons(path, b"\n \n")[0]


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    content = b"".join(encoded(line) + b"\n" + GOOD + b"\n" for line, _ in BAD)
    problems = reasons(tmp_path / "data.jsonl", content)
    assert len(problems) == len(BAD)
    for at, (problem, (_, reason)) in enumerate(zip(problems, BAD, strict=True)):
        assert f":{2 * at + 1}: " in problem
        assert reason in problem


def test_very_many_bad_lines_are_counted(tmp_path: Path) -> None:
    problems = reasons(tmp_path / "data.jsonl", b"{}\n" * (SHOWN + 1234))
    assert len(problems) == SHOWN + 1
    assert problems[-1] == "and 1,234 more bad lines"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_no_bytes_whatever_they_are_do_worse_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    with contextlib.suppress(Refusal):
        read(path, content)


def test_the_four_shapes(tmp_path: Path) -> None:
    system = {"role": "system", "content": ""}
    lines = [
        {"messages": [system, USER, ANSWER]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ANSWER, USER, ANSWER]},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"instruction": "a", "input": " ", "output": "b"},
        {"text": "a"},
    ]
    found = read(tmp_path / "data.jsonl", b"\n".join(map(encoded, lines)))
    user_c = {"role": "user", "content": "a\n\nc"}
    assert found == [
        DataRecord("messages", (system, USER, ANSWER), 2, "", None, 1),
        DataRecord("prompt", (USER, ANSWER), 1, "", "a", 2),
        DataRecord("prompt", (USER, ANSWER, USER, ANSWER), 1, "", None, 3),
        DataRecord("instruction", (USER, ANSWER), 1, "", "a\n", 4),
        DataRecord("instruction", (user_c, ANSWER), 1, "", "a\n\nc\n", 5),
        DataRecord("instruction", (USER, ANSWER), 1, "", "a\n", 6),
        DataRecord("text", (), 0, "a", None, 7),
    ]
    same = [found[i].digest() for i in (1, 3, 5)]
    assert len(set(same)) == 1
    assert len({record.digest() for record in found}) == 5


def test_marks_line_ends_and_a_missing_last_one_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    plain = read(path, GOOD + b"\n" + GOOD)
    assert read(path, b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n") == plain
    assert len(plain) == 2


def test_notes_are_ignored_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a", "id": 1, "_mine": 2}\n{"text": "b", "id": [3]}\n')
    problems = Problems()
    file = RecordFile(path, problems)
    assert len(list(file)) == 2
    problems.check()
    assert file.ignored == {"id": 2, "_mine": 1}


def test_a_line_that_is_too_long_is_told_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 100)
    fits = b'{"text": "' + b"x" * 88 + b'"}'
    assert len(fits) == 100
    path = tmp_path / "data.jsonl"
    assert len(read(path, fits + b"\r\n" + fits)) == 2
    long = b'{"text": "' + b"x" * 89 + b'"}'
    for line in (long, long * 7):
        [problem] = reasons(path, line + b"\n" + GOOD)
        assert problem == f"{path}:1: is longer than 100 bytes"
        [problem] = reasons(path, GOOD + b"\n" + line)
        assert problem.startswith(f"{path}:2: ")


def test_a_file_that_is_too_large_missing_empty_or_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    assert "is empty" in reasons(path, b"")[0]
    with pytest.raises(Refusal, match="is not a file"):
        list(RecordFile(tmp_path, Problems()))
    with pytest.raises(Refusal, match="No such file"):
        list(RecordFile(tmp_path / "nothing", Problems()))
    monkeypatch.setattr(records, "MAX_FILE", 10)
    assert "at most 10" in reasons(path, GOOD)[0]
