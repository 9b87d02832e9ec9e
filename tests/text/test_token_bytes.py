"""Bytes of tokens: joined they are the text, for every kind of tokenizer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loraplex_model.checkpoints.chat import TextRefused
from loraplex_server.text.detokenizer import TokenTexts
from loraplex_server.text.tokenizer import INLINE_CHARACTERS, TextTokenizer
from rpc.harness import make_tokenizer, write_model
from text.test_detokenizer import BYTES, KINDS, is_text, kinds, runs, sequences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXTS = ["the quick brown fox", "déjà vu 日本語 😀😁\U0001f9ff", "a\ufffdb\0c\td\r\n", " ", "é"]


@kinds
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_joined_they_are_the_text_that_the_library_decodes(name: str, data: st.DataObject) -> None:
    tokenizer, _ = KINDS[name]
    ids = data.draw(sequences(name))
    joined = b"".join(TokenTexts(tokenizer).raws(ids))
    if name == "byte_level":
        assert joined.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)
    else:
        # Of a run that is no text, the library gives no byte.
        assume(all(map(is_text, runs(tokenizer, ids, skip=False))))
        assert joined.decode() == tokenizer.decode(ids, skip_special_tokens=False)


@kinds
def test_a_token_after_another_has_the_bytes_that_it_adds(name: str) -> None:
    tokenizer, _ = KINDS[name]
    texts = TokenTexts(tokenizer)
    [first] = tokenizer.encode("a", add_special_tokens=False).ids[:1] or [5]
    before = tokenizer.decode([first], skip_special_tokens=False)
    for token in range(tokenizer.get_vocab_size()):
        word = tokenizer.id_to_token(token)
        if word in BYTES and name in {"llama", "gemma", "byte_metaspace"}:
            assert texts.raw(token) == bytes([BYTES.index(word)])
        else:
            after = tokenizer.decode([first, token], skip_special_tokens=False)
            added = texts.raw(token).decode(errors="replace")
            assert after == before + added
    assert texts.raw(1 << 30) == b""


def test_special_tokens_have_the_bytes_that_they_have_in_a_text() -> None:
    for tokenizer in (make_tokenizer(), sentence_piece()):
        tokenizer.add_special_tokens(["<é>", "<Ġ>", "<a b>", "<a▁b>", "<日本>"])
        for word in ("<é>", "<Ġ>", "<a b>", "<a▁b>", "<日本>", "<s>"):
            ids = tokenizer.encode(f"x{word}y", add_special_tokens=False).ids
            assert tokenizer.token_to_id(word) in ids
            joined = b"".join(TokenTexts(tokenizer).raws(ids)).decode(errors="replace")
            assert joined == tokenizer.decode(ids, skip_special_tokens=False)


def sentence_piece() -> Tokenizer:
    """A tokenizer as those of Llama 2: words that begin with a space, and single bytes."""
    words = ["<unk>", "<s>", "</s>", *BYTES, *"▁abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE(
        {word: at for at, word in enumerate(words)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, sentence_piece])
def test_texts_that_transformers_encodes_come_back(make) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    tokenizer = make()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    texts = TokenTexts(tokenizer)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert b"".join(texts.raws(ids)).decode() == theirs.decode(ids)
        if text != " " or make is make_tokenizer:
            assert theirs.decode(ids) == text
        assert b"".join(map(texts.raw, ids)).strip() == text.encode().strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_texts_and_tokens_of_any_length_become_each_other(folder: Path) -> None:
    library = make_tokenizer()

    async def scenario() -> None:
        tokenizer = TextTokenizer(folder, max_context=4)
        for text in ("", "the fox", "é😺 <s> </s>x", "日本\0語 " * INLINE_CHARACTERS):
            found = await tokenizer.tokens(text, begins=False, with_bytes=True)
            assert found.token_ids == library.encode(text, add_special_tokens=False).ids
            assert len(found.pieces) == len(found.token_ids)
            assert b"".join(found.pieces) == text.encode()
            for skip in (False, True):
                back = await tokenizer.text_of(found.token_ids, skip, with_bytes=False)
                assert back.text == library.decode(found.token_ids, skip_special_tokens=skip)
                assert back.pieces == []
            if "<s>" not in text:
                assert back.text == text

    asyncio.run(scenario())


def test_without_a_tokenizer_both_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "model.json").write_text(
        (folder / "model.json")
        .read_text()
        .replace('"has_tokenizer": true', '"has_tokenizer": false')
    )

    async def scenario() -> None:
        tokenizer = TextTokenizer(tmp_path, 100)
        assert not tokenizer.has_tokenizer
        assert tokenizer.token_bytes(3) == b""
        with pytest.raises(TextRefused, match="no tokenizer"):
            await tokenizer.tokens("x", True, True)
        with pytest.raises(TextRefused, match="no tokenizer"):
            await tokenizer.text_of([1], False, False)

    asyncio.run(scenario())
