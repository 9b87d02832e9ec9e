"""Training data in the shapes and files that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from field.bases import command, inspected

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
ASKED = {"role": "user", "content": "hi"}
TOLD = {"role": "assistant", "content": "hello"}


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path


def taken(path: Path, *options: str) -> str:
    done = inspected(path, *options)
    assert done.code == 0, done.text
    return done.text


SHAPES: dict[str, dict[str, Any]] = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    },
    "prompt beside messages": {"prompt": "hi", "prompt_id": "0f", "messages": [ASKED, TOLD]},
    "alpaca with its text": {"instruction": "a", "input": "", "output": "b", "text": "a b"},
    "dolly": {"instruction": "a", "context": "", "response": "b", "category": "open_qa"},
    "question": {"question": "1+1?", "answer": "2"},
    "alpaca with system": {
        **{"instruction": "a", "input": "", "output": "b"},
        **{"system": "Be brief.", "history": []},
    },
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, TOLD]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TOLD],
    },
    "tools": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "18"},
            {"role": "assistant", "content": "18 degrees."},
        ],
        "tools": [
            {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        ],
    },
    "null input": {"instruction": "Name it.", "input": None, "output": "Lima"},
    "null keys of messages": {"messages": [{**ASKED, "name": None}, {**TOLD, "tool_calls": None}]},
    "null keys of a line": {"messages": [ASKED, TOLD], "tools": None, "system": None},
    "null key of another shape": {"prompt": "a", "completion": "b", "text": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_taken(tmp_path: Path, shape: str) -> None:
    taken(lines(tmp_path / "data.jsonl", SHAPES[shape], SHAPES[shape]))


def test_weight_of_a_message_says_what_is_learned(tmp_path: Path) -> None:
    messages = [ASKED, {**TOLD, "content": "bad", "weight": 0}, ASKED, {**TOLD, "weight": 1}]
    text = taken(lines(tmp_path / "data.jsonl", {"messages": messages}))
    assert "bad" in text


def test_missing_answer_is_asked_for_and_never_advised_away(tmp_path: Path) -> None:
    line = {"instruction": "a", "reply_text": "b"}
    done = inspected(lines(tmp_path / "data.jsonl", line))
    assert done.code != 0
    assert "remove" not in done.text
    assert "reply_text" in done.text
    taken(lines(tmp_path / "data.jsonl", line), "--columns", "output=reply_text")


def test_preference_pairs_are_refused_by_name(tmp_path: Path) -> None:
    done = inspected(
        lines(tmp_path / "data.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    )
    assert done.code != 0
    assert "preference" in done.text


def test_unanswered_conversation_is_dropped_and_counted(tmp_path: Path) -> None:
    good = [{"messages": [{"role": "user", "content": str(n)}, TOLD]} for n in range(3)]
    path = lines(tmp_path / "data.jsonl", *good, {"messages": [ASKED, TOLD, ASKED]})
    assert "dropped" in taken(path)
    assert inspected(path, "--strict").code != 0


def test_files_of_other_kinds(tmp_path: Path) -> None:
    pairs = [{"prompt": f"a{n}", "completion": "b"} for n in range(3)]
    (tmp_path / "array.json").write_text(json.dumps(pairs, indent=2))
    (tmp_path / "table.csv").write_text('prompt,completion\n"a, or b",b\nc,d\n')
    (tmp_path / "lines.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(pair) + "\n" for pair in pairs).encode())
    )
    (tmp_path / "blank.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, pairs)) + "\n\n")
    for name in ("array.json", "table.csv", "lines.jsonl.gz", "blank.jsonl"):
        taken(tmp_path / name)


def test_unreadable_file_says_once_what_it_is(tmp_path: Path) -> None:
    files = {
        "table.parquet": (b"PAR1" + bytes(range(256)) * 4 + b"PAR1", "Parquet"),
        "book.xlsx": (b"PK\x03\x04" + bytes(60), "zip"),
        "data.zst": (b"\x28\xb5\x2f\xfd" + bytes(60), "zst"),
        "utf16.jsonl": ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "UTF-16"),
    }
    for name, (content, kind) in files.items():
        (tmp_path / name).write_bytes(content)
        done = inspected(tmp_path / name)
        assert done.code != 0
        assert len(done.errors) == 1, done.text
        assert kind.lower() in done.errors[0].lower()


def test_what_cannot_be_published_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *(SHAPES["question"] for _ in range(4)))
    words = ("run", "--data", data, "--name", "Orders_v2", "--store", tmp_path / "store")
    done = command("loraplex-train", *words)
    assert done.code != 0
    assert "orders-v2" in done.text
