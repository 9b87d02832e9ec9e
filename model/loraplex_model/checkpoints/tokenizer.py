"""The text side of a base model, for a front process without torch and transformers.

`write` makes `tokenizer.json` and `model.json` once, with transformers; afterwards
`TokenizerInfo.read` and `tokenizers.Tokenizer.from_file` suffice.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from loraplex_model.base.refusal import Reason, Refusal, model_invalid
from loraplex_model.checkpoints.chat import ChatTemplate
from loraplex_model.checkpoints.control.ends import end_tokens
from loraplex_model.checkpoints.gguf import splits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
MODEL = "model.json"


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
        tool_template: Jinja source for conversations with tools; None for `chat_template`.
    """

    architecture: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    adds_bos: bool
    chat_template: str | None
    special_tokens: dict[str, str]
    has_tokenizer: bool
    tool_template: str | None = None

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

    def with_template(self, path: Path | None) -> TokenizerInfo:
        """The same with the chat template in a file; itself if `path` is None.

        Raises Refusal(CONFIG_INVALID, field "chat_template") if the file cannot be read.
        """
        if path is None:
            return self
        try:
            source = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            message = f"the chat template {path} cannot be read: {error}"
            raise Refusal(Reason.CONFIG_INVALID, message, "chat_template") from error
        return dataclasses.replace(self, chat_template=source, tool_template=None)

    def compiled(self, clock: Callable[[], datetime] = datetime.now) -> ChatTemplate | None:
        """The chat template; None if there is none. `clock` returns the time that it may print.

        Raises `Refusal` (MODEL_INVALID) if it does not compile.
        """
        if self.chat_template is None:
            return None
        try:
            return ChatTemplate(self.chat_template, self.special_tokens, clock, self.tool_template)
        except TemplateError as error:
            raise model_invalid(f"the chat template does not compile: {error}") from error


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
            chat_template=_named_template(tokenizer, source, "default"),
            special_tokens={
                name: str(text)
                for name, text in tokenizer.special_tokens_map.items()
                if isinstance(text, str)
            },
            has_tokenizer=True,
            tool_template=_named_template(tokenizer, source, "tool_use"),
        )
        ends = all_end_tokens(info, directory, named_ends, vocab_size)
        info = dataclasses.replace(info, eos_token_ids=ends)
    fields = dataclasses.asdict(info)
    if info.tool_template is None:
        del fields["tool_template"]  # so that older versions can read the file
    (directory / MODEL).write_text(json.dumps(fields, indent=1), "utf-8")
    return info


def check(source: Path) -> None:
    """Raises `Refusal` (MODEL_INVALID, MODEL_UNSUPPORTED) if the tokenizer cannot be converted.

    Of a GGUF file only the settings are looked at, since its vocabulary takes seconds.
    """
    if source.is_file():
        splits.options_of(source)
    else:
        _load(source)


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
    from tokenizers import Tokenizer  # a machine that only computes may lack it

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise model_invalid(f"{path} cannot be read: {error}") from error


def _load(source: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if source.is_file():
            metadata, options = splits.options_of(source)
            # AutoTokenizer returns this class, too, but parses the whole file first (10 s)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(source.parent), gguf_file=source.name, **options
            )
            splits.correct(tokenizer, metadata)
            return tokenizer
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Refusal:
        raise
    except Exception as error:  # transformers raises many kinds for a malformed tokenizer
        raise model_invalid(f"the tokenizer of {source} cannot be read: {error}") from error


def _first_token(path: Path) -> int | None:
    ids: list[int] = _open(path).encode("a").ids
    return ids[0] if ids else None


def _named_template(tokenizer: Any, source: Path, name: str) -> str | None:
    """One of a checkpoint's chat templates; a single one is called "default"."""
    found = tokenizer.chat_template
    beside = source / "chat_template.json"  # multimodal checkpoints have theirs there
    if found is None and beside.is_file():
        try:
            found = json.loads(beside.read_text("utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError) as error:
            raise model_invalid(f"{beside} cannot be read: {error}") from error
    if isinstance(found, str):
        found = {"default": found}
    template = found.get(name) if isinstance(found, dict) else None
    return template if isinstance(template, str) else None
