"""A request for vectors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from loraplex_gateway.wire.bodies import invalid


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """The body of `/v1/embeddings`. `pooling` is not one of OpenAI's fields."""

    model: str
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    request_id: str | None = None


def inputs_of(given: Any, pooling: str | None) -> dict[str, Any]:
    """The client's options for the texts, or for the token ids of each text. Raises ApiError (400).

    A text may stand alone, and so may the token ids of one.
    """
    found: dict[str, Any] = {"pooling": pooling} if pooling is not None else {}
    if isinstance(given, str):
        return {**found, "texts": [given]}
    if not isinstance(given, list) or not given:
        raise invalid("input", "must be a text, or a list of texts or of token ids that has some")
    if all(isinstance(each, str) for each in given):
        return {**found, "texts": given}
    if all(map(_is_id, given)):
        return {**found, "token_ids": [given]}
    for i, ids in enumerate(given):
        if not isinstance(ids, list) or not ids or not all(map(_is_id, ids)):
            raise invalid(f"input[{i}]", "must be like the others: texts, or lists of token ids")
    return {**found, "token_ids": given}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
