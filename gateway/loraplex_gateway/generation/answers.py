"""Parts of answers that all interfaces share: the numbers of tokens, the adapter, why it ended."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex import FinishReason, MatchedStop, ResolvedAdapter, Usage
from starlette.requests import Request

from loraplex_gateway.errors import REQUEST_ID

ADAPTER_HEADER: Final = "x-loraplex-adapter"
MAX_REQUEST_ID: Final = 128


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of an answer have in common.

    Attributes:
        request_id: the id under which the server logs the request.
        model: the model as the request names it.
        fingerprint: identifies the weights of the base.
        created: when the request came, in seconds since 1970.
    """

    request_id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, prefix: str) -> dict[str, Any]:
        """The first fields of an answer of the type `kind`."""
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def headers(self, adapters: Iterable[ResolvedAdapter]) -> dict[str, str]:
        """The headers of an answer that these adapters computed."""
        found = {REQUEST_ID: self.request_id}
        if shown := adapter_header(adapters):
            found[ADAPTER_HEADER] = shown
        return found


def request_id_of(request: Request, given: str | None) -> str:
    """The id of a request: as its body or its header gives it, or a new one."""
    if given:
        return given
    sent = request.headers.get(REQUEST_ID, "")
    if 0 < len(sent) <= MAX_REQUEST_ID and sent.isascii() and sent.isprintable():
        return sent
    return uuid.uuid4().hex


def fingerprint_of(digest: str) -> str:
    """OpenAI's form of the digest of the base's weights."""
    return f"fp_{digest.removeprefix('sha256:')[:12]}"


def adapter_header(adapters: Iterable[ResolvedAdapter]) -> str:
    """`name@3 sha256:...` for each adapter; in a mix with its weight."""
    found = list(adapters)
    is_mix = len(found) > 1 or any(each.weight != 1.0 for each in found)
    return ", ".join(
        f"{each.name}@{each.version} {each.digest}" + (f";weight={each.weight:g}" if is_mix else "")
        for each in found
    )


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """The numbers of tokens of one prompt's completions, or of several prompts' added up."""
    return usage(
        sum(each.prompt_tokens for each in usages),
        sum(each.completion_tokens for each in usages),
        sum(each.cached_prompt_tokens for each in usages),
    )


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """The numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason(reason: FinishReason) -> str:
    """OpenAI's word."""
    return "length" if reason is FinishReason.LENGTH else "stop"


def stop_reason(matched: MatchedStop | None, asked: Sequence[int] | None) -> str | int | None:
    """The stop string or the requested stop token that ended an answer; None for an end token."""
    if matched is None:
        return None
    if matched.text is not None:
        return matched.text
    return matched.token_id if matched.token_id in (asked or ()) else None


def merged(options: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the client with others; those that are None are left out."""
    return {name: value for name, value in {**options, **more}.items() if value is not None}
