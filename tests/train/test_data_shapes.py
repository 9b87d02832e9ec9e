"""What people's files hold is taken for what it means, and what is not clear is asked for."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from loraplex_training.cli import app
from loraplex_training.data.prepare import without_nulls
from loraplex_training.data.problems import Dropped
from loraplex_training.data.shapes import DataRecord, read_record, table
from loraplex_training.data.shapes.conversation import LEARN_KEYS, ROLES
from loraplex_training.data.shapes.values import DEEPEST
from typer.testing import CliRunner

DOCUMENT = Path(__file__).parents[2] / "docs/training.md"
BEGIN, END = "<!-- shapes: begin -->\n", "\n<!-- shapes: end -->"

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "weather", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "18"}


def read(line: dict[str, Any], given: str = "", named: tuple[str, ...] = ()) -> DataRecord:
    return read_record(without_nulls(line), 1, Counter(), given, named)


def messages(line: dict[str, Any], given: str = "") -> list[Any]:
    return [dict(message) for message in read(line, given).messages]


def share_gpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


def test_the_document_shows_what_the_command_prints() -> None:
    ran = CliRunner().invoke(app, ["shapes"])
    assert ran.exit_code == 0
    text = DOCUMENT.read_text()
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert shown == ran.stdout.strip() == table.markdown()


@pytest.mark.parametrize("asked", table.EXCHANGES)
@pytest.mark.parametrize("answer", table.ANSWERS)
def test_a_question_and_its_answer_whatever_they_are_called(asked: str, answer: str) -> None:
    record = read({asked: "a", answer: "b", "category": "x", "id": 1})
    assert record.messages == (USER, ANSWER)
    assert record.shape == asked
    assert record.plain == ("a" if asked == "prompt" else "a\n")
    for context in set(table.CONTEXTS) - {asked}:
        if asked != "input":
            with_text = read({asked: "a", context: "c", answer: "b"})
            assert with_text.messages[0]["content"] == "a\n\nc"
            assert read({asked: "a", context: " ", answer: "b"}) == record


@pytest.mark.parametrize("key", table.CHATS)
def test_a_conversation_in_either_spelling(key: str) -> None:
    assert messages({key: [SYSTEM, USER, ANSWER]}) == [SYSTEM, USER, ANSWER]
    [turns] = share_gpt(("system", "Be brief."), ("human", "a"), ("gpt", "b")).values()
    assert messages({key: turns}) == [SYSTEM, USER, ANSWER]
    assert messages({key: json.dumps(turns)}) == [SYSTEM, USER, ANSWER]  # a cell of a table


@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role in ROLES for name in ROLES[role] if role != "call"]
)
def test_roles_are_those_of_templates(role: str, name: str) -> None:
    turns = [("human", "a"), ("gpt", "b")]
    turns.insert(0 if role == "system" else 1, (name.title(), "c"))
    assert {"role": role, "content": "c"} in messages(share_gpt(*turns))


def test_calls_that_are_turns_of_their_own_become_calls_of_the_assistant() -> None:
    call = json.dumps(CALL["function"])
    for words in (call, json.dumps([CALL["function"]])):
        turns = [("human", "a"), ("function_call", words), ("observation", "18"), ("gpt", "b")]
        line = share_gpt(*turns) | {"tools": json.dumps([FUNCTION])}
        assert messages(line) == [USER, CALLING, RESULT, ANSWER]
        assert read(line).tools == (TOOL,)
    spelt = "<functioncall> weather"
    turns = [("human", "a"), ("function_call", spelt), ("gpt", "b")]
    assert messages(share_gpt(*turns))[1] == {"role": "assistant", "content": spelt}


@pytest.mark.parametrize("arguments", ['{"city": "Lima"}', {"city": "Lima"}])
@pytest.mark.parametrize("content", [{}, {"content": ""}])
def test_calls_in_the_forms_of_requests(arguments: object, content: dict[str, str]) -> None:
    function = {"name": "weather", "arguments": arguments}
    expected = {**CALLING, "content": content.get("content")}
    for call in ({"type": "function", "function": function}, function):
        turn = {"role": "assistant", **content, "tool_calls": [call]}
        assert messages({"messages": [USER, turn]})[1] == expected
    legacy = {"role": "assistant", **content, "function_call": function}
    assert messages({"messages": [USER, legacy]})[1] == expected
    [with_id] = messages({"messages": [USER, {**CALLING, "tool_calls": [{"id": "1", **CALL}]}]})[1][
        "tool_calls"
    ]
    assert with_id == {"id": "1", **CALL}


@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], [{"type": "function", **FUNCTION}]])
@pytest.mark.parametrize("key", table.TOOLS)
def test_tools_in_their_forms(tools: list[Any], key: str) -> None:
    for value in (tools, json.dumps(tools)):
        assert read({"messages": [USER, ANSWER], key: value}).tools == (TOOL,)
    assert read({"messages": [USER, ANSWER], key: []}).tools == ()
    assert read({"prompt": [USER], "completion": [CALLING], key: tools}).tools == (TOOL,)
    with pytest.raises(ValueError, match='has no "name"'):
        read({"messages": [USER, ANSWER], key: [{"description": "x"}]})


def test_parts_of_text_are_kept_and_one_part_is_its_text() -> None:
    part = {"type": "text", "text": "a"}
    assert messages({"messages": [{"role": "user", "content": [part]}, ANSWER]})[0] == USER
    two = {"role": "user", "content": [part, part]}
    assert messages({"messages": [two, ANSWER]})[0] == two
    with pytest.raises(ValueError, match='of the type "image_url"; only text'):
        read({"messages": [{"role": "user", "content": [part, {"type": "image_url"}]}, ANSWER]})


@pytest.mark.parametrize("key", table.SYSTEMS)
def test_a_system_message_beside_the_example(key: str) -> None:
    line = {"instruction": "a", "output": "b", key: "Be brief."}
    record = read(line)
    assert record.messages == (SYSTEM, USER, ANSWER)
    assert record.plain is None  # a plain prompt has no place for it
    assert record.answer == 2
    assert messages({"messages": [USER, ANSWER], key: "Be brief."}) == [SYSTEM, USER, ANSWER]
    assert messages({"messages": [SYSTEM, USER, ANSWER], key: "Be brief."})[0] == SYSTEM
    assert read(line | {key: " "}) == read({"instruction": "a", "output": "b"})
    with pytest.raises(ValueError, match="another system message"):
        read({"messages": [SYSTEM, USER, ANSWER], key: "Be long."})


def test_history_is_told_before_the_question_and_not_learned_by_default() -> None:
    line = {"instruction": "a", "output": "b", "history": [["c", "d"]]}
    record = read(line)
    assert [message["content"] for message in record.messages] == ["c", "d", "a", "b"]
    assert record.answer == 3
    assert read(line | {"history": []}).plain == "a\n"
    with pytest.raises(ValueError, match=r"history\[0\] is not a pair"):
        read(line | {"history": [["c"]]})


def test_a_list_on_one_side_and_a_string_on_the_other() -> None:
    expected = [USER, ANSWER]
    for asked, answer in itertools.product(("a", [USER]), ("b", [ANSWER])):
        record = read({"prompt": asked, "completion": answer})
        assert list(record.messages) == expected
        assert record.plain == ("a" if (asked, answer) == ("a", "b") else None)


def test_copies_are_ignored_and_counted_and_other_texts_are_not() -> None:
    talk = {"messages": [USER, ANSWER]}
    for line in (
        talk | {"prompt": "a", "prompt_id": "0f"},
        {"messages": [SYSTEM, *talk["messages"]], "prompt": "a"},
        talk | {"prompt": [USER]},
        talk | {"text": "User: a Assistant: b"},
        {"instruction": "a", "output": "b", "text": "Instruction: a Response: b"},
    ):
        ignored = Counter[str]()
        assert list(read_record(line, 1, ignored).messages)[-2:] == [USER, ANSWER]
        assert set(ignored) == line.keys() - {"messages", "instruction", "output"}
    for line in (talk | {"prompt": "x"}, talk | {"prompt": [SYSTEM]}, talk | {"text": "a"}):
        with pytest.raises(ValueError, match="--shape messages"):
            read(line)
        assert messages(line, "messages") == [USER, ANSWER]


@pytest.mark.parametrize("key", LEARN_KEYS)
def test_messages_say_whether_they_are_learned(key: str) -> None:
    for no, yes in ((0, 1), (False, True), (0.0, 1.0)):
        talk = [USER, ANSWER | {key: no}, USER | {key: no}, ANSWER | {key: yes}]
        record = read({"messages": talk})
        assert record.given == {1}
        assert record.messages == (USER, ANSWER, USER, ANSWER)
        after = read({"prompt": [SYSTEM, USER], "completion": talk[1:], "system": "Be brief."})
        assert after.given == {2}
    for wrong in (0.5, 2, -1, "0"):
        with pytest.raises(ValueError, match="possible are 0"):
            read({"messages": [USER, ANSWER | {key: wrong}]})
    with pytest.raises(ValueError, match="asks to learn"):
        read({"messages": [USER | {key: 1}, ANSWER]})
    with pytest.raises(Dropped, match="weight 0"):
        read({"messages": [USER, ANSWER | {key: 0}]})


def test_keys_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="contradicts itself"):
        read({"messages": [USER, ANSWER | {"weight": 0, "train": True}]})


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ({"messages": [USER, ANSWER, USER]}, 'ends with a message of the role "user"'),
        ({"messages": [USER, CALLING, RESULT]}, 'ends with a message of the role "tool"'),
        ({"messages": [USER]}, "must end with an answer"),
        ({"messages": []}, 'has nothing under "messages"'),
        ({"messages": [USER, SYSTEM, ANSWER]}, "not the first one"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "a message that is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "a message without content"),
        ({"instruction": "a", "output": ""}, 'has nothing under "output"'),
        ({"text": "\n"}, 'has nothing under "text"'),
        (
            {"messages": [USER, ANSWER | {"function_call": {"name": "f", "arguments": "["}}]},
            "arguments are not a JSON object",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_learned_from_is_left_out(line: dict[str, Any], cause: str) -> None:
    with pytest.raises(Dropped, match=cause) as caught:
        read(line)
    assert caught.value.cause in str(caught.value)
    assert "[" not in caught.value.cause  # the same for every message, so that it can be counted


UNCLEAR: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "a", "reply": "b"}, 'no "output"; is it "reply"? use --columns output=reply'),
    ({"instruction": "a", "input": "c", "ouput": "b", "more": "x"}, "--columns output=ouput"),
    ({"Question": "a", "Answer": "b"}, "--columns prompt=Question,completion=Answer"),
    ({"problem": "a", "solution": "b", "answer": "4"}, "--columns completion=answer"),
    ({"prompt": "a", "question": "b", "answer": "4"}, "or use --shape prompt"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "_context=context"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "--columns messages=chosen"),
    ({"prompt": "a", "completion": "b", "label": True}, "label is true"),
    ({"text": "a", "label": "spam"}, "--columns prompt=text,completion=label"),
    ({"input_ids": [1, 2], "labels": [1, 2]}, "tokenised already"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "only text can be trained on"),
    ({"prompt": "a", "completion": "b", "stars": 5}, "--shape prompt, which ignores"),
    ({"messages": [USER, ANSWER | {"stars": 5}]}, "use --shape"),
    ({"messages": [{"role": "bot", "content": "a"}, ANSWER]}, "--roles bot="),
]


@pytest.mark.parametrize(("line", "way_out"), UNCLEAR, ids=[way for _, way in UNCLEAR])
def test_what_is_not_clear_is_refused_with_the_way_out(line: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ValueError, match=re.escape(way_out)) as caught:
        read(line)
    assert not isinstance(caught.value, Dropped)
    assert "remove" not in str(caught.value)  # it could be what is to be learned


def test_the_ways_out_lead_out() -> None:
    line = {"problem": "a", "solution": "b", "answer": "c"}
    renamed = {"problem": "a", "solution": "b", "completion": "c"}
    assert read(renamed, named=("completion",)).messages[1]["content"] == "c"
    assert read(line, "problem").messages[1]["content"] == "b"
    with pytest.raises(ValueError, match='"completion", "solution"'):
        read(renamed)
    pair = {"prompt": "a", "completion": "b", "rejected": "c"}
    assert read(pair, "prompt", ("completion",)).messages == (USER, ANSWER)
    both = {"prompt": "x", "question": "a", "answer": "b"}
    assert read(both, "question").messages == (USER, ANSWER)
    assert messages({"messages": [USER, ANSWER | {"stars": 5}]}, "messages") == [USER, ANSWER]
    assert read({"prompt": "a", "completion": "b", "stars": 5}, "prompt").plain == "a"


def test_equal_examples_have_equal_digests_and_what_is_learned_is_part_of_them() -> None:
    talk = [USER, ANSWER, USER, ANSWER]
    same = [
        read({"messages": talk}),
        read({"messages": [USER, ANSWER | {"weight": 1}, USER, ANSWER]}),
        read({"instruction": "a", "output": "b", "history": [["a", "b"]]}),
    ]
    different = [
        read({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}),
        read({"messages": talk, "tools": [TOOL]}),
        read({"messages": [USER, CALLING, USER, ANSWER]}),
        read({"messages": [USER | {"name": "x"}, ANSWER, USER, ANSWER]}),
    ]
    assert len({record.digest() for record in same}) == 1
    assert len({record.digest() for record in (*same, *different)}) == 1 + len(different)


def test_tools_and_arguments_are_bounded_in_depth() -> None:
    deep: dict[str, Any] = {}
    for _ in range(DEEPEST + 300):
        deep = {"a": deep}
    call = {"name": "weather", "arguments": deep}
    for line in (
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [USER, ANSWER], "tools": [{"name": "weather", "parameters": deep}]},
    ):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            read_record(line, 1, Counter())
