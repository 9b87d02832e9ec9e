"""Every token that is named as an end ends an answer, and bases converted before learn of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_model.checkpoints import cache, load
from loraplex_model.checkpoints.chat import ChatTemplate
from loraplex_model.checkpoints.control.ends import end_of_turn, named_end_tokens
from loraplex_model.checkpoints.gguf.source import GgufSource
from loraplex_model.checkpoints.load import known_end_tokens, known_fingerprint, load_base
from loraplex_model.checkpoints.tokenizer import SpeltToken, TokenizerInfo
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import gguf_files, tiny

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, "a"])}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in SPECIAL])
    return tokenizer


def write(
    folder: Path, config: Any, generation: Any, eos: str | None, template: str | None = None
) -> Path:
    """A tiny base whose files name different end tokens."""
    tiny.write("llama", folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words(), eos_token=eos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def ends(folder: Path, tmp_path: Path) -> tuple[int, ...]:
    return load_base(str(folder), torch.float32, tmp_path / "cache").weights.eos_token_ids


@pytest.mark.parametrize(
    ("config", "generation", "eos", "template", "right"),
    [
        (0, 0, "<|im_end|>", None, (0, 2)),
        (0, [3, 0], None, None, (0, 3)),
        ([3, 0], [2, 0], "<|eot|>", None, (3, 0, 2)),
        (None, None, "<|im_end|>", None, (2,)),
        (0, 0, "<|endoftext|>", CHATML, (0, 2)),
        (None, None, None, None, ()),
    ],
)
def test_all_that_is_named_ends_an_answer(
    config: Any, generation: Any, eos: str | None, template: str | None, right: Any, tmp_path: Path
) -> None:
    folder = write(tmp_path / "base", config, generation, eos, template)
    assert ends(folder, tmp_path) == right
    assert ends(folder, tmp_path) == right  # from the cache
    [info] = (tmp_path / "cache").glob("entries/*/model.json")
    assert TokenizerInfo.read(info.parent).eos_token_ids == right


@pytest.mark.parametrize("wrong", [tiny.VOCAB, -1, 1.0, True, "2", [], {}, [None, 99_999]], ids=str)
def test_what_is_no_token_is_left_out_with_a_warning(
    wrong: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert named_end_tokens("configuration", {"eos_token_id": wrong}, tiny.VOCAB) == []
    assert ("of the base model's configuration is left out" in caplog.text) == (wrong != [])
    assert ends(write(tmp_path / "base", 0, wrong, "<|im_end|>"), tmp_path) == (0, 2)


def test_a_gguf_files_ends_of_text_turn_and_message_all_end_an_answer(tmp_path: Path) -> None:
    names = {"eot_token_id": 5, "eom_token_id": 6}
    metadata = {f"tokenizer.ggml.{name}": token for name, token in names.items()}
    path = gguf_files.write("llama", tmp_path / "m.gguf", metadata)
    assert GgufSource(path).config["eos_token_id"] == 2
    assert ends(path, tmp_path) == (2, 5, 6)


@pytest.mark.parametrize(
    ("template", "right"),
    [
        (CHATML, 2),
        (CHATML.replace("<|im_end|>", "<|im_end|><|eot|>"), 2),
        (CHATML.replace("<|im_end|>", " <|im_end|>"), None),
        (CHATML.replace("<|im_end|>", "</turn>"), None),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), 3),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", None),
        ("{% for m in messages %}[INST]{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[7].content.x }}", None),
    ],
)
def test_a_templates_end_of_turn_is_what_it_writes_after_an_answer(
    template: str, right: int | None
) -> None:
    compiled = ChatTemplate(template, {"eos_token": "<|eot|>"})
    assert end_of_turn(words(), compiled) == right


def test_a_template_that_does_not_compile_ends_nothing(tmp_path: Path) -> None:
    assert ends(write(tmp_path / "base", 0, 0, "<|im_end|>", "{% for %}"), tmp_path) == (0, 2)


def make_old(entry: Path) -> None:
    """Makes an entry of the cache as older versions wrote it: one end token, no version of it."""
    record = json.loads((entry / cache.ENTRY).read_text())
    decoder = json.loads((entry / load.DECODER).read_text())
    del decoder["end_tokens"]
    model = json.loads((entry / "model.json").read_text())
    for name, fields in ((load.DECODER, decoder), ("model.json", model)):
        content = json.dumps({**fields, "eos_token_ids": [0]}).encode()
        (entry / name).write_bytes(content)
        record["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (entry / cache.ENTRY).write_text(json.dumps(record))


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_base_that_an_older_version_converted_gets_its_end_tokens_without_a_conversion(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "directory":
        source, right = write(tmp_path / "base", 0, [0, 3], "<|im_end|>"), (0, 3, 2)
    else:
        metadata = {"tokenizer.ggml.eot_token_id": 5}
        source, right = gguf_files.write("llama", tmp_path / "m.gguf", metadata), (2, 5)
    fresh = load_base(str(source), torch.float32, tmp_path / "cache")
    make_old(fresh.directory)
    before = {path: path.read_bytes() for path in fresh.directory.iterdir()}

    def convert(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(load, "convert", convert)
    old = load_base(str(source), torch.float32, tmp_path / "cache")
    assert old.weights.eos_token_ids == fresh.weights.eos_token_ids == right
    assert old.weights.fingerprint == fresh.weights.fingerprint
    assert {path: path.read_bytes() for path in fresh.directory.iterdir()} == before
    known = known_end_tokens(str(source), tmp_path / "cache")
    assert [token.token_id for token in known or ()] == [*right]


def test_the_end_tokens_of_a_converted_base_are_known_with_their_spellings(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", 0, 0, "<|im_end|>")
    assert known_end_tokens(str(folder), tmp_path / "cache") is None
    ends(folder, tmp_path)
    spelt = [SpeltToken(0, "<|endoftext|>"), SpeltToken(2, "<|im_end|>")]
    assert known_end_tokens(str(folder), tmp_path / "cache") == spelt
    assert known_fingerprint(str(folder), tmp_path / "cache").startswith("sha256:")
