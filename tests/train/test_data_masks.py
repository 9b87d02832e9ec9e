"""Which tokens of a conversation are learned, held against transformers' assistant masks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.chat import TextRefused
from loraplex_training import data
from loraplex_training.data.problems import Dropped, Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.samples import Sample
from loraplex_training.data.tokenise import Tokeniser
from loraplex_training.spec.spec import DataSpec

from train.chat_bases import CHATML, FORGETFUL, ChatBase, chat_base
from train.test_data_tokenise import answers, learned

TOOLED = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that takes tools, with the tag that marks the assistant's words."""

DEAF = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ['user', 'assistant'] %}"
)
"""A template that leaves out all roles but two, silently."""

USER = {"role": "user", "content": "what is the weather?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "18"}
ANSWER = {"role": "assistant", "content": "the end"}
TALK = [USER, CALLING, RESULT, ANSWER]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatBase]:
    root = tmp_path_factory.mktemp("bases")
    templates = {
        "chatml": CHATML,
        "tooled": TOOLED,
        "forgetful": FORGETFUL,
        "deaf": DEAF,
        "none": None,
    }
    return {name: chat_base(root / name, template) for name, template in templates.items()}


_files = itertools.count()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


def samples(
    base: ChatBase, scratch: Path, line: dict[str, Any], learn: str = "auto"
) -> list[Sample]:
    path = scratch / f"{next(_files)}.jsonl"
    path.write_text(json.dumps(line))
    problems = Problems(strict=True)
    records = list(RecordFile(path, problems))
    problems.check()
    return Tokeniser(base.text, 10_000, learn, None).samples(records[0])


def weights(talk: list[dict[str, Any]], *values: int) -> list[dict[str, Any]]:
    """The conversation with weights of its answers."""
    given_ = iter(values)
    return [m | {"weight": next(given_)} if m["role"] == "assistant" else m for m in talk]


def assert_is_theirs(
    base: ChatBase, sample: Sample, talk: list[dict[str, Any]], tools: list[Any] | None = None
) -> None:
    """The ids and the mask are those of transformers, up to the last EOS."""
    theirs = base.theirs.apply_chat_template(
        talk, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [*sample.tokens] == theirs["input_ids"][: len(sample.tokens)]
    mask = theirs["assistant_masks"]
    assert [int(yes) for yes in sample.learned] == mask[: len(sample.tokens)]
    assert sum(mask) == sum(sample.learned) > 0


def test_tools_and_calls_are_what_transformers_renders(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["tooled"]
    written = {**CALL, "id": "1"}
    written["function"] = {**CALL["function"], "arguments": json.dumps({"city": "Paris"})}
    lines: list[dict[str, Any]] = [
        {"messages": TALK, "tools": [TOOL]},
        {
            "messages": [USER, {**CALLING, "tool_calls": [written]}, RESULT, ANSWER],
            "tools": json.dumps([TOOL]),
            "parallel_tool_calls": False,
        },
        {"prompt": [USER], "completion": TALK[1:], "functions": [TOOL["function"]]},
        {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "18"},
                {"from": "gpt", "value": "the end"},
            ],
            "tools": [TOOL],
        },
    ]
    for line in lines:
        [sample] = samples(base, scratch, line)
        assert_is_theirs(base, sample, TALK, [TOOL])
        call, end = (base.text.decode(answer) for _, answer in answers(sample))
        assert call == f"<call>{json.dumps(CALL['function'])}</call>"
        assert end == "the end"
    [sample] = samples(base, scratch, {"messages": TALK[:2]})
    assert_is_theirs(base, sample, TALK[:2])


WORDS = st.text("the quick\n<>{}", min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS, st.integers(0, 1)), min_size=1, max_size=4))
def test_answers_of_weight_0_are_given_and_the_others_learned(
    bases: dict[str, ChatBase], scratch: Path, turns: list[tuple[str, str, int]]
) -> None:
    base = bases["chatml"]
    talk: list[dict[str, Any]] = []
    for asked, answer, weight in turns:
        talk += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer, "weight": weight},
        ]
    wanted = [answer for _, answer, weight in turns if weight]
    if not wanted:
        with pytest.raises(Refusal, match="weight 0"):
            samples(base, scratch, {"messages": talk})
        return
    runs = [run for s in samples(base, scratch, {"messages": talk}) for run in answers(s)]
    assert [base.text.decode(answer) for _, answer in runs] == wanted
    plain = [{key: m[key] for key in ("role", "content")} for m in talk]
    learned_ = [2 * at + 1 for at, (_, _, weight) in enumerate(turns) if weight]
    for (before, _), at in zip(runs, learned_, strict=True):
        theirs = base.theirs.apply_chat_template(plain[:at], add_generation_prompt=True)
        assert before == theirs["input_ids"]


def test_the_word_of_weight_0_is_in_the_example(bases: dict[str, ChatBase], scratch: Path) -> None:
    base = bases["chatml"]
    talk = [USER, ANSWER | {"content": "quick"}, USER, ANSWER]
    [sample] = samples(base, scratch, {"messages": weights(talk, 0, 1)})
    [(before, answer)] = answers(sample)
    assert base.text.decode(answer) == "the end"
    assert (
        before == base.theirs.apply_chat_template(talk[:3], add_generation_prompt=True)["input_ids"]
    )
    assert "quick" in base.text.decode(before)
    [first] = samples(base, scratch, {"messages": weights(talk, 1, 0)})
    assert base.text.decode(learned(first)) == "quick"
    assert "the end" not in base.text.decode(first.tokens)  # nothing is learned after the first


def test_all_learns_all_but_answers_of_weight_0(bases: dict[str, ChatBase], scratch: Path) -> None:
    talk = [USER, ANSWER | {"content": "quick"}, USER, ANSWER]
    base = bases["chatml"]
    for values, missing in (((0, 1), "quick"), ((1, 0), "the end")):
        [sample] = samples(base, scratch, {"messages": weights(talk, *values)}, "all")
        pairs = zip(sample.tokens[1:], sample.learned[1:], strict=True)
        left = [token for token, yes in pairs if not yes]
        assert base.text.decode(left) == missing
    thought = [USER, ANSWER | {"content": "<think>fox</think>dog"}, USER, ANSWER]
    with pytest.raises(Dropped, match="--learn all cannot leave it out"):
        samples(bases["forgetful"], scratch, {"messages": weights(thought, 0, 1)}, "all")


def test_weights_where_a_template_rewrites_history(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["forgetful"]
    thoughts = [{"role": "assistant", "content": f"<think>fox {i}</think>dog {i}"} for i in "123"]
    talk = [message for thought in thoughts for message in (USER, thought)]
    made = samples(base, scratch, {"messages": weights(talk, 1, 0, 1)})
    assert [s.reference for s in made] == [thoughts[0]["content"], thoughts[2]["content"]]
    for sample, at in zip(made, (0, 4), strict=True):
        [(before, _)] = answers(sample)
        theirs = base.theirs.apply_chat_template(talk[: at + 1], add_generation_prompt=True)
        assert before == theirs["input_ids"]
    shown = base.text.decode(made[1].tokens)
    assert "dog 2" in shown
    assert "fox 2" not in shown


def test_a_call_that_the_template_leaves_out_is_not_learned(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["chatml"]
    [sample] = samples(base, scratch, {"messages": TALK, "tools": [TOOL]})
    [(before, answer)] = answers(sample)
    assert base.text.decode(answer) == "the end"
    empty = [USER, {"role": "assistant", "content": ""}, RESULT]
    theirs = base.theirs.apply_chat_template(empty, add_generation_prompt=True)
    assert before == theirs["input_ids"]
    with pytest.raises(Dropped, match="tool calls only"):
        samples(base, scratch, {"messages": TALK[:2]})
    path = scratch / "told.jsonl"
    path.write_text(json.dumps({"messages": TALK, "tools": [TOOL]}) + "\n")
    report = data.load(DataSpec(path, eval_fraction=0), base.text).report
    assert report.left_out == {"tools": 1, "tool calls": 1}
    assert "these answers are not learned" in " ".join(report.notes())
    with pytest.raises(Refusal, match="leaves out tools, tool calls"):
        data.load(DataSpec(path, eval_fraction=0, strict=True), base.text)


@pytest.mark.parametrize("role", ["tool", "developer"])
def test_a_message_that_the_template_leaves_out_drops_the_line(
    bases: dict[str, ChatBase], scratch: Path, role: str
) -> None:
    line = {"messages": [USER, ANSWER, {"role": role, "content": "18"}, ANSWER]}
    with pytest.raises(TextRefused, match="leaves messages of the role"):
        samples(bases["deaf"], scratch, line)
    assert samples(bases["chatml"], scratch, line)


def test_without_a_template_conversations_are_bad_lines(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    question = {"instruction": "a", "output": "b"}
    for line in (
        {"messages": [USER, ANSWER]},
        question | {"system": "x"},
        question | {"history": [["c", "d"]]},
        question | {"tools": [TOOL]},
    ):
        with pytest.raises(ValueError, match="no chat template") as caught:
            samples(bases["none"], scratch, line)
        assert not isinstance(caught.value, Dropped)
    assert samples(bases["none"], scratch, question | {"system": "", "history": []})
