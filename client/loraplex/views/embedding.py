"""Texts as vectors: the call, its request and its result."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from loraplex.connection import ServerConnection
from loraplex.errors import invalid
from loraplex.replies import read
from loraplex.requests import fill
from loraplex.results import ResolvedAdapter
from loraplex.v1 import generation_pb2

Pooling = Literal["last", "mean"]
"""How the hidden states of a text's tokens become one vector: the last token's, or their mean."""

_POOLINGS = {"last": generation_pb2.POOLING_LAST, "mean": generation_pb2.POOLING_MEAN}


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of one text, and the number of its tokens.

    `base_tokens` are those that the base model alone computed before an activated LoRA; if they are
    all, the text does not contain the adapter's invocation tokens, and the vector is the base's.
    """

    values: tuple[float, ...]
    tokens: int
    base_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of texts, in the order of the texts, and the adapter that computed them."""

    vectors: tuple[Embedding, ...] = field(metadata={"sent_as": "embeddings"})
    adapters: tuple[ResolvedAdapter, ...] = ()
    request_id: str = ""


class _Calls(Protocol):
    """What the call needs of the client's calls."""

    _connection: ServerConnection


async def embed(
    self: _Calls,
    texts: str | Sequence[str] | None = None,
    *,
    token_ids: Sequence[Sequence[int]] | None = None,
    adapter: str | None = None,
    pooling: Pooling = "last",
    raw_length: bool = False,
    request_id: str | None = None,
    timeout: float | None = None,
) -> Embeddings:
    """Returns the last hidden state of each text, after the final norm, as a vector of length 1.

    Give either `texts`, one or several, or `token_ids`, a list for each text. `adapter` computes
    them, or the base model. With `pooling` "mean" a vector is the mean over the text's tokens, and
    not the state of the last one. With `raw_length` it is not scaled to length 1.
    """
    request = embed_request(texts, token_ids, adapter, pooling, raw_length, request_id)
    method = self._connection.stubs.generation.Embed
    return read(Embeddings, await self._connection.call(method, request, timeout))


def embed_request(
    texts: str | Sequence[str] | None,
    token_ids: Sequence[Sequence[int]] | None,
    adapter: str | None,
    pooling: str,
    raw_length: bool,
    request_id: str | None,
) -> generation_pb2.EmbedRequest:
    """Returns the request. Raises InvalidRequest."""
    if (texts is None) == (token_ids is None):
        raise invalid("texts", "give either texts or token_ids")
    if pooling not in _POOLINGS:
        raise invalid("pooling", f"must be one of {', '.join(_POOLINGS)}")
    inputs: list[generation_pb2.EmbedInput] = []
    for i, text in enumerate([texts] if isinstance(texts, str) else texts or ()):
        inputs.append(fill(generation_pb2.EmbedInput, f"inputs[{i}].", text=text))
    for i, ids in enumerate(token_ids or ()):
        where = f"inputs[{i}].token_ids."
        given = fill(generation_pb2.TokenIds, where, ids=ids)
        inputs.append(generation_pb2.EmbedInput(token_ids=given))
    return fill(
        generation_pb2.EmbedRequest,
        adapter_id=adapter,
        inputs=inputs,
        pooling=_POOLINGS[pooling],
        raw_length=raw_length,
        request_id=request_id,
    )
