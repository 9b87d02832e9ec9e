"""Checks of requests for vectors of texts."""

from __future__ import annotations

from typing import Final

from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Problem

from loraplex_server.rpc.calls.bounds import MAX_LISTED, MAX_REQUEST_ID, MAX_TEXTS, MAX_TOKEN_IDS
from loraplex_server.rpc.calls.ids import is_request_id
from loraplex_server.rpc.messages.validate import ModelBounds, RequestChecks

MAX_VALUES: Final = 8 << 20
"""Numbers in the vectors of one reply: 32 MiB."""


def embed(request: generation_pb2.EmbedRequest, bounds: ModelBounds, width: int) -> list[Problem]:
    """Problems of a request; `width` is the number of values of a vector."""
    checks = RequestChecks("")
    if request.adapter_id:
        checks.adapter_id("adapter_id", request.adapter_id)
    most = min(MAX_TEXTS, MAX_VALUES // width)
    count = len(request.inputs)
    checks.require(1 <= count <= most, "inputs", f"must have 1 to {most} entries")
    for i, given in enumerate(request.inputs[:most]):
        _text(given, f"inputs[{i}]", bounds, checks)
        if len(checks.problems) == MAX_LISTED:
            break
    known = generation_pb2.Pooling.values()
    checks.require(request.pooling in known, "pooling", "is not a value of Pooling")
    if request.request_id:
        checks.require(
            is_request_id(request.request_id),
            "request_id",
            f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters",
        )
    return checks.problems


def total_tokens(tokens: int) -> list[Problem]:
    """Problems of the number of tokens that all texts of a request have together."""
    if tokens <= MAX_TOKEN_IDS:
        return []
    text = f"have {tokens} tokens together; at most {MAX_TOKEN_IDS} are possible in one request"
    return [Problem("inputs", text)]


def _text(
    given: generation_pb2.EmbedInput, field: str, bounds: ModelBounds, checks: RequestChecks
) -> None:
    match given.WhichOneof("input"):
        case "text":
            checks.require(bool(given.text), f"{field}.text", "must not be empty")
        case "token_ids":
            ids = given.token_ids.ids
            checks.require(bool(ids), f"{field}.token_ids.ids", "must not be empty")
            # A text longer than the context is refused as such, without a check of each token.
            if len(ids) < bounds.max_context:
                checks.tokens(f"{field}.token_ids.ids", ids, bounds.vocab_size)
        case None:
            checks.add(field, "one of `text` or `token_ids` must be set")
