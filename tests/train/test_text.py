"""The trainer's text is the server's: same renderings, same ids."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.chat import ChatOptions, TextRefused
from loraplex_model.checkpoints.default_model import ensure_default_model
from loraplex_model.checkpoints.load import load_base
from loraplex_model.checkpoints.tokenizer import TokenizerInfo
from loraplex_server.text.tokenizer import TextTokenizer
from loraplex_training.data.text import BaseText
from transformers import PreTrainedTokenizerFast

from examples.tasks import routing
from train.chat_bases import (
    CHATML,
    END_OF_TURN,
    EOS,
    FORGETFUL,
    INST,
    NO_END,
    ChatBase,
    byte_level,
    chat_base,
    sentence_piece,
    write,
)

TALK = [
    {"role": "system", "content": ""},
    {"role": "user", "content": " Hello,\n\nwhat? <|im_end|> "},
    {"role": "assistant", "content": "<think>déjà</think>\n\nvu 😀"},
    {"role": "user", "content": "the end"},
]


def prompting(generation_prompt: bool) -> ChatOptions:
    return ChatOptions(add_generation_prompt=generation_prompt)


TEMPLATES = [CHATML, FORGETFUL, NO_END, END_OF_TURN, INST]


@pytest.fixture(params=["bytes", "sentence-piece"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> ChatBase:
    if request.param == "bytes":
        return chat_base(tmp_path, adds_bos=True)
    return write(tmp_path, sentence_piece(), INST, adds_bos=True)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renderings_equal_transformers(
    template: str, generation_prompt: bool, tmp_path: Path
) -> None:
    base = chat_base(tmp_path, template)
    assert base.text.prompt(
        TALK, prompting(generation_prompt)
    ).text == base.theirs.apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=generation_prompt
    )


def test_what_a_template_sets_within_the_generation_tag_is_not_seen_after(tmp_path: Path) -> None:
    template = (
        "{% set x = 'a' %}{% generation %}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    base = chat_base(tmp_path, template)
    ours = base.text.prompt(TALK[1:2]).text
    assert ours == base.theirs.apply_chat_template(TALK[1:2], tokenize=False)
    assert ours.startswith("ba")


def test_ids_equal_the_servers(base: ChatBase) -> None:
    server = TextTokenizer(base.folder, 1000)
    prompt = base.text.prompt(TALK).token_ids
    assert prompt == asyncio.run(server.render_chat(TALK)).token_ids
    for text in ("Hello", " the end\n", "日本\x00語"):
        assert base.text.prompt_ids(text) == asyncio.run(server.encode(text))


def test_no_special_token_is_added_unless_asked_for_and_bos_never_twice(base: ChatBase) -> None:
    bos = base.theirs.bos_token_id
    assert bos not in base.text.ids("Hello")
    assert base.text.prompt_ids("Hello").count(bos) == 1
    assert base.text.prompt_ids(f"{base.theirs.bos_token}Hello").count(bos) == 1


def test_decoding_leaves_special_tokens_out_and_pieces_keep_them(tmp_path: Path) -> None:
    text = chat_base(tmp_path).text
    ids = text.ids(f"日本 the end{EOS}\n")
    assert text.decode(ids) == "日本 the end\n"
    assert "".join(text.pieces(ids)) == f"日本 the end{EOS}\n"
    assert len(text.pieces(ids)) == len(ids)
    assert text.is_special(text.eos)
    assert not text.is_special(ids[0])


def test_a_template_that_writes_the_date_gives_the_same_text_every_day(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat_base(tmp_path, template).text.prompt(TALK[1:2]).text.startswith("26 Jul 2024")


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    base = chat_base(tmp_path)
    assert base.text.template_digest == hashlib.sha256(CHATML.encode()).hexdigest()
    content = (tmp_path / "tokenizer.json").read_bytes()
    assert base.text.tokenizer_digest == hashlib.sha256(content).hexdigest()
    assert chat_base(tmp_path, None).text.template_digest == ""


def test_without_a_template_messages_are_refused_and_text_works(tmp_path: Path) -> None:
    text = chat_base(tmp_path, None).text
    with pytest.raises(TextRefused, match="no chat template"):
        text.prompt(TALK)
    assert text.decode(text.ids("the end")) == "the end"


def test_the_default_models_conversations_equal_transformers() -> None:
    cache = Path(__file__).parents[2] / "var" / "cache"
    gguf = ensure_default_model(cache)
    base = load_base("default", torch.float32, cache)
    text = BaseText(base.directory, base.weights.eos_token_ids)
    # the class that AutoTokenizer ends at, without its detour (10 s)
    theirs = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    [row] = routing.rows(1, 1)
    words = [{**turn, "content": turn["content"].replace(EOS, "")} for turn in TALK]
    talks = [words, words[1:], [{"role": "user", "content": row["prompt"]}]]
    for talk, generation_prompt in itertools.product(talks, (True, False)):
        ours = text.prompt(talk, prompting(generation_prompt)).token_ids
        encoded = theirs.apply_chat_template(talk, add_generation_prompt=generation_prompt)
        assert ours == encoded["input_ids"]
    assert text.eos == theirs.eos_token_id == theirs.pad_token_id


def test_a_base_that_cannot_be_trained_on_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = chat_base(tmp_path)

    def problem(eos: tuple[int, ...] = (2,), **changes: object) -> str:
        info = dataclasses.replace(TokenizerInfo.read(base.folder), **changes)  # type: ignore[arg-type]
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "model.json").write_text(json.dumps(dataclasses.asdict(info)))
        byte_level().save(str(folder / "tokenizer.json"))
        with pytest.raises(Refusal) as caught:
            BaseText(folder, eos)
        assert caught.value.reason == "CONFIG_INVALID"
        return str(caught.value)

    assert "no end-of-text token" in problem((), chat_template=None)
    assert "no tokenizer" in problem(has_tokenizer=False)
    assert "does not compile" in problem(chat_template="{% for %}")
    (base.folder / "tokenizer.json").write_text("{")
    with pytest.raises(Refusal, match=r"tokenizer\.json"):
        BaseText(base.folder, (2,))
    with pytest.raises(Refusal, match=r"model\.json"):
        BaseText(tmp_path / "nowhere", (2,))
