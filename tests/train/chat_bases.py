"""Text sides of bases: small tokenizers of different kinds, with chat templates that differ.

Each is written as a loaded base's directory, which the trainer and the server read, and as the
transformers tokenizer that both are held against.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from loraplex_model.checkpoints.tokenizer import TokenizerInfo
from loraplex_training.data.text import BaseText
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
"""As SmolLM2's, with the tag that marks the assistant's words."""

FORGETFUL = CHATML.replace(
    "{% generation %}{{ m.content }}",
    "{% generation %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
)
"""Reasoning is dropped from earlier answers."""

OPENING = CHATML.replace(
    "assistant{{ '\\n' }}{% endif %}", "assistant{{ '\\n<think>' }}{% endif %}"
)
"""A new answer opens with words that a told one does not have."""

NO_END = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Neither EOS nor end of turn, only empty lines."""

END_OF_TURN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""An end of turn that is not EOS."""

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
    "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
"""As Llama 2's: the opening of an answer is nothing at all, and an answer begins with a space."""

CORPUS = [
    "system user assistant ASSISTANT USER [INST] [/INST] Hello, what is the weather in Paris?\n",
    "the quick brown fox jumps over the lazy dog\n\n\n\nand stops {\"at\": \"the end\"}\n\n",
    "déjà vu 😀😁😂 日本語 <think> </think>",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatBase:
    """One text side, written to `folder`."""

    folder: Path
    text: BaseText
    theirs: PreTrainedTokenizerFast


def byte_level(adds_bos: bool = False) -> Tokenizer:
    """BPE as GPT-2's, but line ends merge with what is around them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", BOS, EOS, "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 1)]
        )
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: a space before the text, spaces part of words, bytes where no word fits."""
    words = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = dict(zip(words, range(len(words)), strict=True))
    merges = []
    for character in "▁HeloINST[]/wrdhanyou?.Pis":
        vocabulary.setdefault(character, len(vocabulary))
    for left, right in (("▁", "H"), ("▁H", "e"), ("l", "l"), ("▁He", "ll"), ("▁Hell", "o"),
                        ("H", "e"), ("He", "ll"), ("Hell", "o"), ("▁", "[")):  # fmt: skip
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
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
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", BOS, EOS)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, template: str | None, adds_bos: bool) -> ChatBase:
    """Pad is EOS, as in most bases."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    eos = tokenizer.token_to_id(EOS)
    info = TokenizerInfo("tiny", (eos,), 1, adds_bos, template, special, True)
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(info)))
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    theirs.chat_template = template
    return ChatBase(folder, BaseText(folder, (eos,)), theirs)


def chat_base(folder: Path, template: str | None = CHATML, adds_bos: bool = False) -> ChatBase:
    """A byte-level one with the template."""
    return write(folder, byte_level(adds_bos), template, adds_bos)
