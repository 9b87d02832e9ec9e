"""Tiny bases with the tokenizers that people have, and servers and command lines on them."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CACHE = ROOT / "var" / "cache"

HIDDEN, FEED_FORWARD, LAYERS, VOCAB = 64, 128, 2, 320
UNKNOWN, OPEN, CLOSE, END_OF_TURN = 0, 1, 2, 3
"""Ids of the special tokens <unk>, <|im_start|>, <|im_end|> and <|eot|>."""

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "<|eot|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(begins: bool = False, ends: bool = False) -> Tokenizer:
    """Bytes without merges; with BOS before a text (`begins`) and EOS after it (`ends`)."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, begins, ends)


def sentence_piece(begins: bool = True) -> Tokenizer:
    """Words begin with U+2581, and unknown characters fall back to bytes."""
    words = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    table = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(table, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_special(tokenizer, begins, False)


def _with_special(tokenizer: Tokenizer, begins: bool, ends: bool) -> Tokenizer:
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    if begins or ends:
        form = f"{'<|im_start|> ' if begins else ''}$A{' <|im_end|>' if ends else ''}"
        ids = [("<|im_start|>", OPEN), ("<|im_end|>", CLOSE)]
        tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    return tokenizer


def chat_tokenizer(tokenizer: Tokenizer, template: str = CHATML) -> PreTrainedTokenizerFast:
    """The tokenizer with the names of its special tokens, as a checkpoint has it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
    )
    fast.chat_template = template or None
    return fast


class Servable(Protocol):
    """A base of the tests, which can be a key."""

    def folder(self) -> Path:
        """The Hugging Face directory."""


TOKENIZERS = {
    "bytes": byte_level,
    "bytes-begin": lambda: byte_level(begins=True),
    "bytes-end": lambda: byte_level(begins=True, ends=True),
    "sentences": sentence_piece,
}


@dataclass(frozen=True)
class TinyBase:
    """A Llama of random weights. `eos` stands in config.json and generation_config.json; the
    tokenizer's own end token is <|im_end|> always.
    """

    tokenizer: str = "bytes"
    template: str = CHATML
    eos: int = CLOSE
    tied: bool = True

    @cache  # noqa: B019  instances live as long as the run
    def folder(self) -> Path:
        """The Hugging Face directory."""
        place = Path(_scratch().name) / f"base-{abs(hash(self)):x}"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=OPEN,
            eos_token_id=self.eos,
            tie_word_embeddings=self.tied,
        )
        LlamaForCausalLM(config).save_pretrained(place)
        chat_tokenizer(TOKENIZERS[self.tokenizer](), self.template).save_pretrained(place)
        return place


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="loraplex-field-")


@dataclass(frozen=True)
class Running:
    """A server that was started for the tests."""

    address: str
    import_root: Path


@cache
def serving(base: Servable | None = None, *flags: str) -> Running:
    """A server on a tiny base, or on the default one, started once and stopped at the end."""
    place = Path(tempfile.mkdtemp(dir=_scratch().name))
    (place / "import").mkdir()
    words = ["--model", str(base.folder()) if base else "default", "--cache", str(CACHE)]
    words += ["--store", str(place / "store"), "--import-root", str(place / "import")]
    words += ["--port", "0", "--admin-port", "0", "--kv-memory", str(64 << 20), "--threads", "1"]
    log = (place / "log").open("wb")
    command = [str(BIN / "loraplex-server"), "serve", *words, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    atexit.register(_stop, process)
    assert process.stdout is not None
    words = process.stdout.readline().split()
    if words[:2] != ["ready:", "grpc"]:
        raise AssertionError("no server: " + (place / "log").read_text()[-2000:])
    return Running(words[2], place / "import")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code, and both outputs."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        """The lines that report an error."""
        return [line for line in self.text.splitlines() if line.startswith("error")]


def command(*words: str | Path, **environment: str) -> Done:
    """Runs one of the project's commands to its end."""
    done = subprocess.run(
        [str(BIN / words[0]), *map(str, words[1:])],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Done(done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace"))


def inspected(path: Path, *options: str) -> Done:
    """What `loraplex-train inspect` says about a data file on the default base."""
    words = ("--eval-fraction", "0", "--cache", CACHE, "--count", "2")
    return command("loraplex-train", "inspect", "--data", path, *words, *options)
