"""The adapters with weights that a request names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.v1 import generation_pb2
from loraplex_adapters.format.kinds.virtual import ROOM
from loraplex_adapters.store import Record
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.access.principals import Principal
from loraplex_server.access.rules import require_base
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.terms import Registered


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter of a request and its weight."""

    adapter: Registered
    weight: float


async def resolve(
    request: generation_pb2.GenerateRequest, registry: Registry, principal: Principal
) -> Sequence[WeightedAdapter]:
    """Resolves the adapters of a valid request, in its order; none for the bare base.

    Raises Refusal for the first, in this order, that does not exist for the principal
    (ADAPTER_NOT_FOUND) or may not be served; PERMISSION_DENIED for the base.
    """
    if request.adapter_id:
        return (WeightedAdapter(await registry.servable(request.adapter_id, principal), 1.0),)
    if not request.mix:
        require_base(principal)
        return ()
    looking = (registry.servable(term.adapter_id, principal) for term in request.mix)
    # All of them are awaited: which one is refused must not depend on whose look-up is faster.
    outcomes = await asyncio.gather(*looking, return_exceptions=True)
    found: list[WeightedAdapter] = []
    for term, outcome in zip(request.mix, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            raise outcome
        weight = term.weight if term.HasField("weight") else 1.0
        found.append(WeightedAdapter(outcome, weight))
    return tuple(found)


def records(adapters: Sequence[WeightedAdapter]) -> list[Record]:
    """The store's records of the adapters, in their order."""
    return [each.adapter.record for each in adapters]


def virtual_tokens(adapters: Sequence[WeightedAdapter]) -> int:
    """Number of positions in the context that the adapters occupy before the prompt."""
    return max((each.adapter.record.virtual_tokens for each in adapters), default=0)


def room_beside(adapters: Sequence[WeightedAdapter], max_context: int) -> int:
    """The positions of the context that are left for prompt and answer.

    Raises Refusal(ADAPTER_TOO_LARGE) if there are fewer, as for an adapter that was registered
    while the context was longer: no prompt is short enough then.
    """
    count = virtual_tokens(adapters)
    if count and max_context - count < ROOM:
        raise Refusal(
            Reason.ADAPTER_TOO_LARGE,
            f"the adapter's {count} virtual tokens leave no room for a prompt and an answer in "
            f"the context of {max_context} positions (max_context)",
        )
    return max_context - count


def unmixable(adapters: Sequence[WeightedAdapter]) -> str:
    """Why these adapters cannot be combined or weighted; "" if they can."""
    used = references(adapters)
    if virtual_tokens(adapters) and (len(used) > 1 or used[0].weight != 1.0):
        return "an adapter with virtual tokens can only be used alone and with weight 1"
    if len(used) > 1 and any(record.invocation_tokens for record in records(adapters)):
        return "an activated LoRA (with invocation tokens) can only be used alone"
    return ""


def references(adapters: Sequence[WeightedAdapter]) -> list[AdapterRef]:
    """References for the engine: each distinct content once, with the sum of its weights."""
    weights: dict[str, float] = {}
    refs = {each.adapter.ref.digest: each.adapter.ref for each in adapters}
    for each in adapters:
        digest = each.adapter.ref.digest
        weights[digest] = weights.get(digest, 0.0) + each.weight
    return [AdapterRef(digest, refs[digest].path, weight) for digest, weight in weights.items()]
