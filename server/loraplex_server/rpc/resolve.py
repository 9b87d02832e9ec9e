"""What a request calls an adapter, and what it resolves to: weights by content."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loraplex.v1 import generation_pb2

from loraplex_server.engine.messages import AdapterRef
from loraplex_server.registry import Registered, Registry

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_PIN: Final = re.compile(r"[1-9][0-9]{0,9}|sha256:[0-9a-f]{64}", re.ASCII)


def is_name(text: str) -> bool:
    """A lower-case RFC 1123 label: what an adapter may be called."""
    return _NAME.fullmatch(text) is not None


def is_adapter_id(text: str) -> bool:
    """`name`, `name@<version>` or `name@sha256:<64 hex digits>`."""
    name, at, pin = text.partition("@")
    return is_name(name) and (not at or _PIN.fullmatch(pin) is not None)


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a request and its factor."""

    adapter: Registered
    weight: float


async def resolve(request: generation_pb2.GenerateRequest, registry: Registry) -> Sequence[Term]:
    """The adapters that a valid request names, in its order; empty for the bare base.

    Raises Refusal(ADAPTER_NOT_FOUND) naming the first that is not there.
    """
    if request.adapter_id:
        return (Term(await registry.resolve(request.adapter_id), 1.0),)
    if not request.mix:
        return ()
    found = await asyncio.gather(*(registry.resolve(term.adapter_id) for term in request.mix))
    weights = [term.weight if term.HasField("weight") else 1.0 for term in request.mix]
    return tuple(Term(a, w) for a, w in zip(found, weights, strict=True))


def virtual_tokens(terms: Sequence[Term]) -> int:
    """Positions of the context that the adapters take before the prompt."""
    return max((term.adapter.record.virtual_tokens for term in terms), default=0)


def mixable(terms: Sequence[Term]) -> bool:
    """Whether these adapters can be used together so: virtual tokens have no weight and no sum."""
    used = references(terms)
    return not virtual_tokens(terms) or (len(used) == 1 and used[0].weight == 1.0)


def references(terms: Sequence[Term]) -> list[AdapterRef]:
    """What the engine is told: each content once, its factors added up."""
    weights: dict[str, float] = {}
    for term in terms:
        weights[term.adapter.digest] = weights.get(term.adapter.digest, 0.0) + term.weight
    paths = {term.adapter.digest: term.adapter.path for term in terms}
    return [AdapterRef(digest, paths[digest], weight) for digest, weight in weights.items()]
