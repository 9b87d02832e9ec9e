"""What is learned is what the server will be asked for: ids before an answer, EOS after it."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.text.tokenizer import TextTokenizer
from loraplex_training.data.problems import Dropped, Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.samples import IGNORED, MicroBatch, Sample
from loraplex_training.data.text import BaseText
from loraplex_training.data.tokenise import Tokeniser
from loraplex_training.data.turns import TurnMaker

from train.chat_bases import (
    CHATML,
    END_OF_TURN,
    EOS,
    FORGETFUL,
    INST,
    NO_END,
    OPENING,
    ChatBase,
    chat_base,
    sentence_piece,
    write,
)

TURNS = [
    {"role": "user", "content": "Hello, what?"},
    {"role": "assistant", "content": "the quick"},
    {"role": "user", "content": "\n\nand the end"},
    {"role": "assistant", "content": '{"at": "Paris"}'},
]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatBase]:
    root = tmp_path_factory.mktemp("bases")
    templates = {
        "chatml": CHATML,
        "forgetful": FORGETFUL,
        "opening": OPENING,
        "no-end": NO_END,
        "end-of-turn": END_OF_TURN,
        "none": None,
    }
    made = {name: chat_base(root / name, template) for name, template in templates.items()}
    made["inst"] = write(root / "inst", sentence_piece(), INST, adds_bos=True)
    made["bos"] = chat_base(root / "bos", None, adds_bos=True)
    return made


_files = itertools.count()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


def samples(
    base: ChatBase,
    scratch: Path,
    line: dict[str, Any],
    learn: str = "auto",
    max_length: int = 10_000,
    system: str | None = None,
) -> list[Sample]:
    path = scratch / f"{next(_files)}.jsonl"
    path.write_text(json.dumps(line))
    problems = Problems()
    records = list(RecordFile(path, problems))
    problems.check()
    return Tokeniser(base.text, max_length, learn, system).samples(records[0])


def learned(sample: Sample) -> list[int]:
    return [t for t, yes in zip(sample.tokens, sample.learned, strict=True) if yes]


def answers(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """Each run of learned tokens, with all that comes before it."""
    runs: list[tuple[list[int], list[int]]] = []
    for at, yes in enumerate(sample.learned):
        if yes and not sample.learned[at - 1]:
            runs.append((list(sample.tokens[:at]), []))
        if yes:
            runs[-1][1].append(sample.tokens[at])
    return runs


SHAPES: list[dict[str, Any]] = [
    {"messages": TURNS[:2]},
    {"messages": TURNS},
    {"prompt": "Hello", "completion": "the end"},
    {"prompt": TURNS[:1], "completion": TURNS[1:2]},
    {"instruction": "what", "input": "the", "output": "fox"},
    {"instruction": "what", "output": "fox"},
    {"text": "the quick brown fox"},
    {"text": f"the quick brown fox{EOS}"},
    {"prompt": "Hello", "completion": f"the end{EOS}"},
]
WITH_TEMPLATE = ["chatml", "forgetful", "opening", "no-end", "end-of-turn", "inst"]


def end_of(base: ChatBase) -> int:
    """The token that ends an answer: the template's, if that is a special token, or else EOS."""
    is_eot = "<|eot|>" in (base.theirs.chat_template or "")
    return base.theirs.convert_tokens_to_ids("<|eot|>") if is_eot else base.text.eos


@pytest.mark.parametrize("name", [*WITH_TEMPLATE, "none", "bos"])
@pytest.mark.parametrize("line", SHAPES, ids=str)
def test_the_last_learned_token_is_eos_and_pad_being_eos_masks_nothing(
    bases: dict[str, ChatBase], scratch: Path, name: str, line: dict[str, Any]
) -> None:
    base = bases[name]
    assert base.theirs.pad_token == base.theirs.eos_token
    if not base.text.has_template and isinstance(line.get("messages", line.get("prompt")), list):
        pytest.skip("needs a template")
    end = base.text.eos if "text" in line else end_of(base)
    for sample in samples(base, scratch, line):
        assert sample.tokens[-1] == end
        assert sample.tokens[-2] not in base.text.eos_ids
        assert sample.learned[-1]
        assert not any(sample.learned[: sample.prompt])
        assert sample.learned[sample.prompt]
        batch = MicroBatch.of([sample])
        assert batch.targets[-2] == end
        if "text" not in line:
            assert (batch.targets[: sample.prompt - 1] == IGNORED).all()


@pytest.mark.parametrize("name", WITH_TEMPLATE)
@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.text("the \n<>", min_size=1).filter(str.strip),
            st.text("\n the{}😀>", min_size=1).filter(str.strip),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_before_every_answer_stands_what_the_server_makes_of_the_conversation_so_far(
    bases: dict[str, ChatBase], scratch: Path, name: str, exchanges: list[tuple[str, str]]
) -> None:
    base = bases[name]
    server = TextTokenizer(base.folder, 10_000)
    talk = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    runs = [run for s in samples(base, scratch, {"messages": talk}) for run in answers(s)]
    assert len(runs) == len(exchanges)
    for i, (before, answer) in enumerate(runs):
        assert before == asyncio.run(server.render_chat(talk[: 2 * i + 1])).token_ids
        assert answer[-1] == end_of(base)
        assert not {*base.text.eos_ids}.intersection(answer[:-1])
        piece = base.theirs.decode([*before, *answer[:-1]], skip_special_tokens=False)
        assert talk[2 * i + 1]["content"].rstrip() in piece.removesuffix("<|eot|>")


def test_the_mask_is_the_one_that_transformers_reads_off_the_template(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["chatml"]
    [sample] = samples(base, scratch, {"messages": TURNS})
    theirs = base.theirs.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    # the line end behind the last EOS is never generated, so it is not in the sample
    assert [*sample.tokens] == theirs["input_ids"][: len(sample.tokens)]
    assert [int(yes) for yes in sample.learned] == theirs["assistant_masks"][: len(sample.tokens)]
    assert sum(theirs["assistant_masks"]) == sum(sample.learned) > 0
    assert sample.reference == "the quick"


def test_tokens_that_would_merge_across_the_beginning_of_an_answer_do_not(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["chatml"]
    rendered = base.text.prompt([user("Hello")])
    prompt = rendered.token_ids
    merged = base.text.ids(rendered.text + "\n\nthe end")
    assert merged[: len(prompt)] != prompt  # or this test shows nothing
    [sample] = samples(base, scratch, {"prompt": "Hello", "completion": "\n\nthe end"})
    assert [*sample.tokens[: sample.prompt]] == prompt
    assert sample.reference == "\n\nthe end"


def test_where_a_template_rewrites_history_a_conversation_becomes_several_examples(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    talk = [TURNS[0], {"role": "assistant", "content": "<think>fox</think>dog"}, *TURNS[2:]]
    made = samples(bases["forgetful"], scratch, {"messages": talk})
    assert [s.reference for s in made] == ["<think>fox</think>dog", '{"at": "Paris"}']
    assert "fox" not in bases["forgetful"].text.decode(made[1].tokens)
    assert len(samples(bases["forgetful"], scratch, {"messages": TURNS})) == 1


def test_an_opening_that_told_answers_lack_is_before_the_answer(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["opening"]
    [sample] = samples(base, scratch, {"prompt": "Hello", "completion": "fox</think>dog"})
    assert base.text.decode(sample.tokens).endswith("assistant\n<think>fox</think>dog")
    assert sample.reference == "fox</think>dog"


def test_an_answer_ends_with_the_templates_end_of_turn_or_with_eos_behind_words_that_are_none(
    bases: dict[str, ChatBase], scratch: Path, tmp_path: Path
) -> None:
    base = bases["end-of-turn"]
    [sample] = samples(base, scratch, {"messages": TURNS})
    eot = base.theirs.convert_tokens_to_ids("<|eot|>")
    assert eot in base.text.eos_ids
    assert [answer[-1] for _, answer in answers(sample)] == [eot] * 2
    assert base.text.eos not in sample.tokens
    worded = chat_base(tmp_path, END_OF_TURN.replace("<|eot|>", " fox"))
    made = samples(worded, scratch, {"messages": TURNS})
    assert [learned(s)[-1] for s in made] == [worded.text.eos] * 2
    assert all(worded.text.decode(learned(s)[:-1]).endswith(" fox") for s in made)
    [plain] = samples(bases["no-end"], scratch, {"prompt": "Hello", "completion": "the end"})
    assert base.text.decode(learned(plain)) == " the end"


def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_into_answers(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["inst"]
    [sample] = samples(base, scratch, {"messages": TURNS[:2]})
    whole = base.theirs.apply_chat_template(TURNS[:2])["input_ids"]
    assert [*sample.tokens] == whole
    words = ["H", "e"]  # "He" is one token, but not behind a prompt that ends within the word
    prompt, completion = f"Hello {words[0]}", f"{words[1]}llo"
    theirs = base.theirs(prompt)["input_ids"]
    answer = TurnMaker(base.text)._continued(
        theirs, base.text.prompt_ids(prompt + completion), completion, base.text.ids
    )
    assert base.theirs.decode(theirs + answer, skip_special_tokens=True) == "Hello Hello"


@pytest.mark.parametrize(
    ("learn", "texts"),
    [
        ("auto", ["the quick", '{"at": "Paris"}']),
        ("assistant", ["the quick", '{"at": "Paris"}']),
        ("completion", ['{"at": "Paris"}']),
    ],
)
def test_which_answers_are_learned(
    bases: dict[str, ChatBase], scratch: Path, learn: str, texts: list[str]
) -> None:
    base = bases["chatml"]
    [sample] = samples(base, scratch, {"messages": TURNS}, learn)
    assert [base.text.decode(answer) for _, answer in answers(sample)] == texts


def test_a_completion_of_several_turns_is_learned_but_not_the_answers_in_its_prompt(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["chatml"]
    line = {"prompt": [*TURNS, user("x")], "completion": [TURNS[1], user("y"), TURNS[3]]}
    [sample] = samples(base, scratch, line)
    texts = [base.text.decode(answer) for _, answer in answers(sample)]
    assert texts == ["the quick", '{"at": "Paris"}']
    assert len(answers(samples(base, scratch, line, "assistant")[0])) == 4


def test_all_learns_all_but_the_first_token(bases: dict[str, ChatBase], scratch: Path) -> None:
    for line in SHAPES:
        [sample] = samples(bases["chatml"], scratch, line, "all")
        assert sample.learned == (False, *[True] * (len(sample.tokens) - 1))


def test_text_is_raw_and_asks_for_no_answer(bases: dict[str, ChatBase], scratch: Path) -> None:
    base = bases["bos"]
    for text in ("the end", f"{base.theirs.bos_token}the end"):
        [sample] = samples(base, scratch, {"text": text})
        assert [*sample.tokens] == [*base.theirs("the end")["input_ids"], base.text.eos]
    with pytest.raises(ValueError, match="has no answer"):
        samples(base, scratch, {"text": "the end"}, "completion")


def test_without_a_template_prompts_are_what_the_server_makes_of_a_plain_prompt(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["bos"]
    [sample] = samples(base, scratch, {"prompt": "Hello\n", "completion": "\nthe end"})
    assert [*sample.tokens[: sample.prompt]] == base.theirs("Hello\n")["input_ids"]
    assert sample.reference == "\nthe end"
    [sample] = samples(base, scratch, {"instruction": "Hello", "input": "x", "output": "fox"})
    assert base.text.decode(sample.tokens) == "Hello\n\nx\nfox"


def test_a_system_message_is_put_before_examples_that_have_none(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    base = bases["chatml"]
    line = {"prompt": "Hello", "completion": "the end"}
    [with_system] = samples(base, scratch, line, system="Be brief")
    told = base.text.prompt([{"role": "system", "content": "Be brief"}, user("Hello")]).token_ids
    assert [*with_system.tokens[: with_system.prompt]] == told
    own = {"messages": [{"role": "system", "content": "mine"}, *TURNS]}
    assert samples(base, scratch, own, system="Be brief") == samples(base, scratch, own)
    line = {"prompt": TURNS[:2], "completion": TURNS[3:]}  # it ends with an answer, not learned
    [last] = samples(base, scratch, line, system="Be brief")
    assert len(answers(last)) == 1


@pytest.mark.parametrize("learn", ["auto", "all"])
def test_what_is_too_long_is_cut_from_the_end(
    bases: dict[str, ChatBase], scratch: Path, learn: str
) -> None:
    line = {"prompt": "Hello", "completion": "the quick brown fox"}
    [whole] = samples(bases["chatml"], scratch, line, learn)
    for length in range(2, len(whole.tokens) + 1):
        made = samples(bases["chatml"], scratch, line, learn, length)
        if learn == "auto" and length <= whole.prompt:
            assert made == []  # nothing is left to learn
            continue
        [cut] = made
        assert cut.tokens == whole.tokens[:length]
        assert cut.learned == whole.learned[:length]
        assert cut.truncated == len(whole.tokens) - length
        assert 0 < cut.prompt < length
        assert cut.reference == whole.reference


@pytest.mark.parametrize("completion", [EOS, f"{EOS}{EOS}", f"  {EOS}", f"{EOS}\n"])
def test_an_answer_of_nothing_but_eos_is_empty(
    bases: dict[str, ChatBase], scratch: Path, completion: str
) -> None:
    for name in ("chatml", "none"):
        with pytest.raises(Dropped, match="is empty"):
            samples(bases[name], scratch, {"prompt": "Hello", "completion": completion})


def test_an_eos_within_an_answer_is_text_where_messages_are(
    bases: dict[str, ChatBase], scratch: Path
) -> None:
    line = {"prompt": "Hello", "completion": f"the{EOS}end{EOS}\n"}
    base = bases["chatml"]
    [sample] = samples(base, scratch, line)
    [(_, answer)] = answers(sample)
    assert answer[-1] == base.text.eos
    assert base.text.eos not in answer[:-1]
    assert "".join(base.text.pieces(answer)) == f"the{EOS}end{EOS}"
    recognised = BaseText(base.folder, (base.text.eos,), special_tokens_in_messages=True)
    for text in (recognised, bases["none"].text):
        with pytest.raises(ValueError, match="where the model would stop"):
            samples(replace(base, text=text), scratch, line)
