"""Sampling in its plain form, one row at a time: what the sampler must choose, bit for bit."""

from __future__ import annotations

import numpy as np
from loraplex_server.engine.batching.sampler import Floats, invert, uniform
from loraplex_server.engine.messages import SamplingParams
from numpy.typing import NDArray

HUGE = np.float32(1e30)
TINY = 1e-37


def choose(params: SamplingParams, prompt: list[int], output: list[int], logits: Floats) -> int:
    """The token that follows `output`."""
    adjusted = adjust(params, prompt, output, logits)
    if params.temperature == 0.0:
        return int(adjusted.argmax())
    with np.errstate(over="ignore"):
        scaled = (adjusted - adjusted.max()) / np.float32(max(params.temperature, TINY))
    ids, weights = candidates(scaled, params.top_k, params.top_p, params.min_p)
    at = invert(weights, uniform(params.seed, len(output)))
    return at if ids is None else int(ids[at])


def adjust(params: SamplingParams, prompt: list[int], output: list[int], logits: Floats) -> Floats:
    seen: dict[int, None] = dict.fromkeys([*prompt, *output])
    counts: dict[int, int] = {}
    for token in output:
        counts[token] = counts.get(token, 0) + 1
    penalised = params.repetition_penalty != 1.0
    counted = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    if not (params.logit_bias or penalised or counted):
        return logits
    logits = logits.clip(-HUGE, HUGE)
    for token, bias in params.logit_bias.items():
        logits[token] += np.float32(bias)
    if penalised:
        ids = np.fromiter(seen, np.int64, len(seen))
        penalty = np.float32(max(params.repetition_penalty, TINY))
        values = logits[ids]
        with np.errstate(over="ignore"):
            logits[ids] = np.where(values < 0, values * penalty, values / penalty)
    if counted and counts:
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[ids] -= np.float32(params.frequency_penalty) * times
        logits[ids] -= np.float32(params.presence_penalty)
    return logits.clip(-HUGE, HUGE, out=logits)


def candidates(
    logits: Floats, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.int64] | None, Floats]:
    ids: NDArray[np.int64] | None = None
    if 0 < top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    elif min_p > 0.0 and top_p >= 1.0:
        ids = np.flatnonzero(logits >= np.float32(np.log(min_p)))
    weights = np.exp(logits if ids is None else logits[ids])
    if top_p < 1.0:
        kept = nucleus(weights, top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if min_p > 0.0 and ids is not None:
        kept = np.flatnonzero(weights >= np.float32(min_p))
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def nucleus(weights: Floats, top_p: float) -> NDArray[np.int64]:
    """Puts the indices of all weights in order, the largest first and of equals the first."""
    total = weights.sum(dtype=np.float64)
    maybe = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))
    order = maybe[np.argsort(-weights[maybe], kind="stable")]
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    return np.sort(order[: max(1, int(np.searchsorted(before, top_p * total)))])


def top_logprobs(logits: Floats, count: int) -> list[tuple[int, float]]:
    largest = logits.max()
    total = np.exp(logits - largest).sum(dtype=np.float64)
    shift = np.float32(np.float64(largest) + np.log(total))
    best = np.argsort(-logits, kind="stable")[:count]
    return [(int(i), float(logits[i] - shift)) for i in best]
