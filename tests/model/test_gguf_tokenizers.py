"""A GGUF file's tokenizer splits text as the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints import tokenizer as tokenizers_of
from loraplex_model.checkpoints.tokenizer import TOKENIZER, TokenizerInfo
from tokenizers import Tokenizer
from transformers import CohereTokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model import gguf_files, tiny

TEXTS = ("a   12", "x\n\n34", "It's 2024.\r\n  yes", " 1234567", "naïve — 東京")
_BYTES = [*bytes_to_unicode().values(), "<s>"]


def write(tmp_path: Path, **keys: Any) -> tuple[Tokenizer, TokenizerInfo]:
    """The tokenizer and its description, made of a file with a vocabulary of bytes."""
    merges = ["Ċ Ċ", "Ġ Ġ", "ĠĠ Ġ", "1 2", "3 4", "12 34", "' s"]
    words = ["".join(merge.split()) for merge in merges]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*_BYTES, *words],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * 256 + [3] + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 256,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }
    path = gguf_files.write("qwen2", tmp_path / "m.gguf", metadata)
    info = tokenizers_of.write(path, tmp_path, "Qwen2ForCausalLM", (), tiny.VOCAB)
    return Tokenizer.from_file(str(tmp_path / TOKENIZER)), info


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("way", ["command-r", "refact", "starcoder"])
def test_digits_are_taken_alone(way: str, tmp_path: Path) -> None:
    theirs = CohereTokenizer().backend_tokenizer
    ours, info = write(tmp_path, pre=way)
    assert [pieces(ours, text) for text in TEXTS] == [pieces(theirs, text) for text in TEXTS]
    assert ours.encode("x\n\n34").tokens == ["x", "ĊĊ", "3", "4"]
    assert not info.adds_bos


@pytest.mark.parametrize(("way", "like"), [("stablelm2", "qwen2"), ("glm4", "llama-bpe")])
def test_equal_ways_have_several_names(way: str, like: str, tmp_path: Path) -> None:
    (ours, _), (other, _) = (write(tmp_path, pre=name) for name in (way, like))
    assert [pieces(ours, text) for text in TEXTS] == [pieces(other, text) for text in TEXTS]
    if like == "qwen2":
        theirs = Qwen2Tokenizer().backend_tokenizer
        assert [pieces(ours, text) for text in TEXTS] == [pieces(theirs, text) for text in TEXTS]
    else:
        assert ours.encode(" 1234567").tokens[:3] == ["Ġ", "12", "3"]


@pytest.mark.parametrize("way", ["gpt-2", "dbrx", "gpt-4o", "tekken", "smaug-bpe", None])
def test_the_ways_that_transformers_knows_are_taken(way: str | None, tmp_path: Path) -> None:
    write(tmp_path, pre=way)


@pytest.mark.parametrize("way", ["bloom", "viking", "superbpe", "made-up", ""])
def test_an_unknown_way_is_named(way: str, tmp_path: Path) -> None:
    keys = {"pre": way} if way else {"pre": 7}
    with pytest.raises(Refusal, match=r"tokenizer\.ggml\.pre = ") as caught:
        write(tmp_path, **keys)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(
    ("keys", "begins"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "tekken"}, True),
        ({"pre": "qwen2"}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
    ],
)
def test_texts_begin_as_the_file_or_llama_cpp_says(
    keys: dict[str, Any], begins: bool, tmp_path: Path
) -> None:
    tokenizer, info = write(tmp_path, **keys)
    assert info.adds_bos == begins
    assert (tokenizer.encode("ab").ids[0] == 256) == begins


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_blank_before_the_first_word_is_added_unless_the_file_says_no(
    prefix: bool | None, tmp_path: Path
) -> None:
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -1.0, -2.0, -0.5],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_bos_token": False,
    }
    path = gguf_files.write("llama", tmp_path / "m.gguf", keys)
    tokenizers_of.write(path, tmp_path, "LlamaForCausalLM", (), tiny.VOCAB)
    ours = Tokenizer.from_file(str(tmp_path / TOKENIZER))
    vocab = {word: i for i, word in enumerate(words)}
    theirs = LlamaTokenizer(vocab, [("▁", "a")], add_prefix_space=prefix)
    for text in ("a b", "ab a", "b"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text).ids) == text
