"""The results of the calls about the base model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token with its spelling in the vocabulary, which is "" without a tokenizer."""

    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class ChatTemplateInfo:
    """A chat template by what it takes.

    `sha256` (hex) is that of its source, and `source` where it comes from: "model" or "operator".
    `variables` are the names that `chat_template_kwargs` may set. `text` is the source itself, in
    Jinja.
    """

    sha256: str
    source: str
    takes_tools: bool
    variables: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The base model of a server.

    `fingerprint` is the digest of its weights. `max_context` counts prompt and completion together.
    `eos_tokens` end a completion, unless an adapter has its own. `bos_token` begins a prompt; None
    if the model adds none. `chat_template` is None if the model has none. `hidden_size` is the
    number of components of an embedding; 0 from an older server. `has_structured_output` says
    whether the form of completions can be asked for.
    """

    name: str
    fingerprint: str
    architecture: str
    max_context: int
    vocab_size: int
    eos_tokens: tuple[NamedToken, ...]
    bos_token: NamedToken | None
    has_tokenizer: bool
    chat_template: ChatTemplateInfo | None
    hidden_size: int = 0
    has_structured_output: bool = False


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt that a conversation is rendered to: the chat template's text, and its tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The tokens of a text, and if requested the bytes of each."""

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class DetokenizedText:
    """The text of tokens, and if requested the bytes of each.

    In the text, bytes that are not a whole character are U+FFFD.
    """

    text: str
    pieces: tuple[bytes, ...]
