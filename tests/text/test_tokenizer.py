"""Tokens to text and back: whole characters, and the ids that Hugging Face gives."""

from __future__ import annotations

import asyncio
import threading
from datetime import datetime
from pathlib import Path

import pytest
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from loraplex_server.text.tokenizer import TextTokenizer, TooLong
from rpc.harness import VOCAB, make_tokenizer, write_model
from tokenizers import Tokenizer, decoders, models, processors

TOKENIZER = make_tokenizer()
SMILE = TOKENIZER.encode("é😺").ids


def metaspace() -> Tokenizer:
    """A SentencePiece-like tokenizer: a word's space is part of its token, bytes are fallbacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁", "▁a", "▁the", "b", "é", "▁é"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_prompts_get_the_ids_that_transformers_gives(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with_bos = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with_bos.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    (tmp_path / "model.json").write_text((folder / "model.json").read_text())
    with_bos.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=with_bos, bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] | upper }}\n{{ m.content | trim }}"
        "{% if not loop.last %}{% continue %}{% endif %}</s>{% endfor %}\n"
        "{%- if add_generation_prompt %}ASSISTANT{{ eos_token }}{% endif %}"
    )
    ours = TextTokenizer(tmp_path, 1000)
    for text in ("", " ", "the quick brown fox", "é😺 <s> </s>x", "日本\x00語" * 600):
        assert asyncio.run(ours.encode(text)) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "<b>é"}]
    template = ChatTemplate(theirs.chat_template, {"bos_token": "<s>", "eos_token": "</s>"})
    opened = ChatOptions(add_generation_prompt=True)
    rendered = template.render(messages, opened)
    assert rendered == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert asyncio.run(ours.encode_chat(messages, opened, template)) == list(
        theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


def test_each_tokens_own_text_is_what_it_decodes_to(folder: Path) -> None:
    tokenizer = TextTokenizer(folder, 100)
    for token in range(VOCAB):
        assert tokenizer.token_text(token) == TOKENIZER.decode([token], skip_special_tokens=False)
    assert tokenizer.token_text(SMILE[-1]) == "\ufffd"


def test_text_that_cannot_fit_is_refused_unread(folder: Path) -> None:
    tokenizer = TextTokenizer(folder, 8)
    with pytest.raises(TooLong):
        asyncio.run(tokenizer.encode("x" * 1000))


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 1}) }}",
    "{{ cycler.__init__.__globals__.os.popen('true') }}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ undefined.field }}",
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused_and_gives_nothing_away(template: str) -> None:
    chat = ChatTemplate(template, {})
    with pytest.raises(TextRefused) as caught:
        chat.render([{"role": "user", "content": "hi"}])
    assert str(caught.value) in {
        "the model's chat template does not accept this conversation",
        "the rendered conversation is too long",
    }


def test_a_template_that_works_too_long_is_tried_once() -> None:
    started: list[datetime] = []

    def clock() -> datetime:
        started.append(datetime(2026, 1, 1))
        return started[0]

    endless = "{{ strftime_now('%Y') }}" + "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(TextRefused, match="too much work"):
        ChatTemplate(endless, {}, clock).render([{"role": "user", "content": "hi"}])
    assert len(started) == 1


def test_an_adapters_template_never_runs_in_the_servers_loop(folder: Path) -> None:
    threads: list[int] = []

    def clock() -> datetime:
        threads.append(threading.get_ident())
        return datetime(2026, 1, 1)

    template = ChatTemplate("{{ strftime_now('%Y') }}{{ messages[0].content }}", {}, clock)
    tokenizer = TextTokenizer(folder, 1000)
    messages = [{"role": "user", "content": "hi"}]
    rendered = asyncio.run(tokenizer.render_chat(messages, template=template))
    assert rendered.text == "2026hi"
    assert threads
    assert threading.get_ident() not in threads


def test_a_model_without_a_tokenizer_takes_token_ids_only(folder: Path, tmp_path: Path) -> None:
    content = (folder / "model.json").read_text()
    (tmp_path / "model.json").write_text(
        content.replace('"has_tokenizer": true', '"has_tokenizer": false')
    )
    tokenizer = TextTokenizer(tmp_path, 10)
    with pytest.raises(TextRefused):
        asyncio.run(tokenizer.encode("hi"))
    assert tokenizer.detokenizer([1]).push(2) == ""
    assert tokenizer.token_text(3) == ""


def test_missing_files_are_an_operators_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(Refusal, match=r"model\.json"):
        TextTokenizer(tmp_path, 10)
    (tmp_path / "model.json").write_text((folder / "model.json").read_text())
    with pytest.raises(Refusal, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path, 10)
