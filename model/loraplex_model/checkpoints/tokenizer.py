"""The text side of a base model, for a front process without torch and transformers.

`write` makes `tokenizer.json` and `model.json` once, with transformers; afterwards
`TokenizerInfo.read` and `tokenizers.Tokenizer.from_file` suffice.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_model.base.refusal import model_invalid

TOKENIZER = "tokenizer.json"
MODEL = "model.json"

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The text side of a base model, stored as `model.json`.

    Attributes:
        architecture: the architecture in the Hugging Face configuration.
        eos_token_ids: ids that end a generation.
        bos_token_id: the first token of a text, or None.
        adds_bos: True if `Tokenizer.encode` adds `bos_token_id`. A chat template writes its own,
            so its result is encoded with `add_special_tokens=False`.
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
    source: Path | None, directory: Path, architecture: str, eos_token_ids: tuple[int, ...]
) -> TokenizerInfo:
    """Makes both files in `directory` from a checkpoint directory or GGUF file.

    `source` is None for a checkpoint without a tokenizer; then only `model.json` is made.
    Raises `Refusal` (MODEL_INVALID) if the tokenizer cannot be converted.
    """
    if source is None:
        info = TokenizerInfo(architecture, eos_token_ids, None, False, None, {}, False)
    else:
        tokenizer = _load(source)
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            content = (Path(scratch) / TOKENIZER).read_bytes()
        (directory / TOKENIZER).write_bytes(content)
        bos = tokenizer.bos_token_id
        info = TokenizerInfo(
            architecture=architecture,
            eos_token_ids=eos_token_ids,
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
    (directory / MODEL).write_text(json.dumps(dataclasses.asdict(info), indent=1), "utf-8")
    return info


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
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(path)).encode("a").ids
    return ids[0] if ids else None


def _default_template(template: Any) -> str | None:
    """The template for chat: of several named templates the one called "default"."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
