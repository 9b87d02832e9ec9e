"""The text side of a base model, for a front process without torch and transformers.

`write` makes `tokenizer.json` and `model.json` once, with transformers; afterwards
`TokenizerInfo.read` and `tokenizers.Tokenizer.from_file` suffice.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from loraplex_model.base.refusal import model_invalid
from loraplex_model.checkpoints.control.ends import end_tokens

TOKENIZER = "tokenizer.json"
MODEL = "model.json"

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class SpeltToken:
    """A token with its spelling in the vocabulary, which is "" without a tokenizer."""

    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The text side of a base model, stored as `model.json`.

    Attributes:
        architecture: the architecture in the Hugging Face configuration.
        eos_token_ids: ids that end a generation; those of `LoadedBase.weights` are more complete
            if an older version wrote the file.
        bos_token_id: the first token of a text, or None.
        adds_bos: True if `Tokenizer.encode` adds `bos_token_id`.
        chat_template: Jinja source, or None.
        special_tokens: texts of "bos_token", "eos_token", ..., which the chat template may use.
        has_tokenizer: False for a checkpoint without one, which takes token ids only.
    """

    architecture: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    adds_bos: bool
    chat_template: str | None
    special_tokens: dict[str, str]
    has_tokenizer: bool

    @staticmethod
    def read(directory: Path) -> TokenizerInfo:
        """Reads `model.json` of a loaded model's directory. Raises `Refusal` (MODEL_INVALID)."""
        path = directory / MODEL
        try:
            fields = json.loads(path.read_text("utf-8"))
            fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
            return TokenizerInfo(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise model_invalid(f"{path} cannot be read: {error}") from error


def write(
    source: Path | None,
    directory: Path,
    architecture: str,
    named_ends: tuple[int, ...],
    vocab_size: int,
) -> TokenizerInfo:
    """Makes both files in `directory` from a checkpoint directory or GGUF file.

    Args:
        source: None for a checkpoint without a tokenizer; then only `model.json` is made.
        named_ends: the end tokens that the configurations name.
        vocab_size: rows of the embedding.

    Raises:
        Refusal: MODEL_INVALID, if the tokenizer cannot be converted.
    """
    if source is None:
        info = TokenizerInfo(architecture, named_ends, None, False, None, {}, False)
    else:
        tokenizer = _load(source)
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            content = (Path(scratch) / TOKENIZER).read_bytes()
        (directory / TOKENIZER).write_bytes(content)
        bos = tokenizer.bos_token_id
        info = TokenizerInfo(
            architecture=architecture,
            eos_token_ids=named_ends,
            bos_token_id=bos,
            adds_bos=bos is not None and _first_token(directory / TOKENIZER) == bos,
            chat_template=_default_template(tokenizer.chat_template),
            special_tokens={
                name: str(getattr(tokenizer, name))
                for name in _SPECIAL
                if getattr(tokenizer, name) is not None
            },
            has_tokenizer=True,
        )
        ends = all_end_tokens(info, directory, named_ends, vocab_size)
        info = dataclasses.replace(info, eos_token_ids=ends)
    (directory / MODEL).write_text(json.dumps(dataclasses.asdict(info), indent=1), "utf-8")
    return info


def all_end_tokens(
    info: TokenizerInfo, directory: Path, named: tuple[int, ...], vocab_size: int
) -> tuple[int, ...]:
    """`named`, and the end tokens of the tokenizer and of the chat template in `directory`.

    Raises `Refusal` (MODEL_INVALID) if the tokenizer cannot be read.
    """
    if not info.has_tokenizer:
        return named
    tokenizer = _open(directory / TOKENIZER)
    return end_tokens(named, tokenizer, info.special_tokens, info.chat_template, vocab_size)


def spellings(directory: Path, ids: Iterable[int]) -> list[SpeltToken]:
    """Tokens with their spellings. Raises `Refusal` (MODEL_INVALID)."""
    if not TokenizerInfo.read(directory).has_tokenizer:
        return [SpeltToken(token, "") for token in ids]
    tokenizer = _open(directory / TOKENIZER)
    return [SpeltToken(token, tokenizer.id_to_token(token) or "") for token in ids]


def _open(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise model_invalid(f"{path} cannot be read: {error}") from error


def _load(source: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if source.is_file():
            # AutoTokenizer returns this class, too, but parses the whole file first (10 s)
            return PreTrainedTokenizerFast.from_pretrained(
                str(source.parent), gguf_file=source.name
            )
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a malformed tokenizer
        raise model_invalid(f"the tokenizer of {source} cannot be read: {error}") from error


def _first_token(path: Path) -> int | None:
    ids: list[int] = _open(path).encode("a").ids
    return ids[0] if ids else None


def _default_template(template: Any) -> str | None:
    """The template for chat: of several named templates the one called "default"."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
