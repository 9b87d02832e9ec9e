"""Choosing the next token of each row, with numpy.

On a processor with kernels the same is done by `decoder/cpu/sampling`, with equal tokens and many
times faster; this form serves decoders without kernels, and is what tests compare the kernels with.

A row's token depends on its own logits, parameters, seed and position alone: reductions over the
vocabulary run row by row, so not one bit of the result can depend on the other rows of the batch.
Only reductions that are exact in any order (largest logit, finiteness) run over all rows at once.

The order of operations is that of Hugging Face `generate`: bias, penalties, the mask of structured
output, temperature, top-k, top-p, min-p. Penalties follow vLLM: repetition over prompt and output,
presence and frequency over the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from ctypes import addressof

import numpy as np
from loraplex_model.base.draws import DrawState
from numpy.typing import NDArray

from loraplex_server.engine.messages import Logprobs, SamplingParams

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]
"""One bit for each token of the vocabulary, the lowest bit of each word first."""
NON_FINITE = -1
"""Returned in place of a token if the row's logits are not all finite."""

_MASK = (1 << 64) - 1
_SEGMENT = 256
_HUGE = np.float32(1e30)
"""Larger than any real logit, and still finite after every adjustment."""
_FORBIDDEN = np.float32(-3e38)
"""Smaller than every adjusted logit, and finite."""
_TINY = 1e-37
"""Smallest divisor used; smaller ones would be 0 in float32."""
_HOT = 2.0
"""Temperature above which top-p counts as costly before the first token."""
_LARGE_PART = 0.25
"""Part of the vocabulary that top-p may put in order before it counts as costly."""
_MOST = (1 << 31) - 1
_NO_IDS = np.empty(0, np.int32)
_NO_COUNTS = np.empty(0, np.float32)


class _Tokens:
    """Different tokens and how often each occurred, as arrays that grow by doubling."""

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._places: dict[int, int] = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
        self._ids = np.fromiter(self._places, np.int64, len(self._places))
        self._counts = np.ones(len(self._places), np.float32)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        """Notes a token. The arrays may be others afterwards."""
        at = self._places.setdefault(token, len(self._places))
        if at == len(self._ids):
            more = max(at, 64)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
        self._ids[at] = token
        self._counts[at] += 1


class Draw:
    """State of one request's sampling: its parameters, random numbers and tokens so far.

    Attributes:
        is_costly: with numpy, the next choice is likely to sort a large part of the vocabulary.
        address: of the `DrawState` from which kernels choose; valid as long as this object lives.
    """

    __slots__ = (
        "_barred_until",
        "_bias_ids",
        "_bias_values",
        "_counts",
        "_index",
        "_is_plain",
        "_mask",
        "_seen",
        "_state",
        "address",
        "is_costly",
        "params",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        ends: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """The first `min_tokens` tokens are none of `ends`."""
        self.params = params
        self._index = 0
        self._barred_until = min_tokens if ends else 0
        penalised = params.repetition_penalty != 1.0
        self._seen = _Tokens(prompt) if penalised else None
        counted = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._counts = _Tokens() if counted else None
        self._mask: Bits | None = None
        self.is_costly = params.top_p < 1.0 and params.temperature > _HOT
        self._state = DrawState(
            seed=params.seed & _MASK,
            top_p=params.top_p,
            top_k=min(params.top_k, _MOST),
            divisor=max(params.temperature, _TINY),
            min_p=params.min_p,
            log_min_p=math.log(params.min_p) if params.min_p > 0.0 else -math.inf,
            repetition=max(params.repetition_penalty, _TINY),
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            greedy=params.temperature == 0.0,
        )
        self.address = addressof(self._state)
        barred = dict.fromkeys(ends, -math.inf) if self._barred_until else {}
        self._bias({**params.logit_bias, **barred})
        self._point()

    def _bias(self, bias: Mapping[int, float]) -> None:
        """Adds these values to the logits of the next choices, in place of others."""
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        self._is_plain = not bias and self._seen is None and self._counts is None
        state = self._state
        state.bias_ids = self._bias_ids.ctypes.data
        state.bias_values = self._bias_values.ctypes.data
        state.biased, state.plain = len(bias), self._is_plain

    def _point(self) -> None:
        """Lets the kernels see the tokens so far."""
        state = self._state
        state.index = self._index
        if self._seen is not None:
            state.seen, state.seen_ids = len(self._seen), self._seen.ids.ctypes.data
        if self._counts is not None:
            state.counted, state.counted_ids = len(self._counts), self._counts.ids.ctypes.data
            state.counts = self._counts.counts.ctypes.data

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the one with the largest unadjusted logit."""
        return self._is_plain and self._mask is None and self.params.temperature == 0.0

    def allow(self, mask: Bits) -> None:
        """Restricts the next choices to the tokens whose bits are set, at least one.

        The bits may change later, as long as no choice is being made.
        """
        self._mask = mask
        self._state.mask = mask.ctypes.data

    def is_biased(self, ahead: int = 0) -> bool:
        """Whether values are added to the logits of the choice that is `ahead` after the next."""
        return bool(self.params.logit_bias) or self._index + ahead < self._barred_until

    def uniform(self, ahead: int = 0) -> float:
        """The random number of the choice that is `ahead` choices after the next; 0 if greedy."""
        if self.params.temperature == 0.0:
            return 0.0
        return uniform(self.params.seed, self._index + ahead)

    @property
    def seen(self) -> NDArray[np.int32]:
        """Different tokens of prompt and output; empty without a repetition penalty."""
        return _NO_IDS if self._seen is None else self._seen.ids.astype(np.int32)

    @property
    def counted(self) -> tuple[NDArray[np.int32], Floats]:
        """Different tokens of the output, and how often each occurred.

        Empty without a presence or frequency penalty.
        """
        if self._counts is None:
            return _NO_IDS, _NO_COUNTS
        return self._counts.ids.astype(np.int32), self._counts.counts.copy()

    def saw(self, token: int) -> None:
        """Notes a generated token."""
        self._index += 1
        if self._seen is not None:
            self._seen.add(token)
        if self._counts is not None:
            self._counts.add(token)
        if self._index == self._barred_until:
            self._bias(self.params.logit_bias)
        self._point()

    def choose(self, logits: Floats) -> int:
        """The next token, from finite logits [vocab]. Repeating the call gives the same token."""
        adjusted = self._adjust(logits)
        if self.params.temperature == 0.0:
            return int(adjusted.argmax())
        scaled = adjusted - adjusted.max()
        with np.errstate(over="ignore"):  # at a tiny temperature all but the best go to -inf
            scaled /= np.float32(max(self.params.temperature, _TINY))
        top_k, top_p, min_p = self.params.top_k, self.params.top_p, self.params.min_p
        ids, weights, ordered = _candidates(scaled, top_k, top_p, min_p)
        self.is_costly = ordered > len(logits) * _LARGE_PART
        at = invert(weights, uniform(self.params.seed, self._index))
        return at if ids is None else int(ids[at])

    def _adjust(self, logits: Floats) -> Floats:
        """Logits [vocab] after bias, penalties and mask; the same array if there are none."""
        if self._is_plain and self._mask is None:
            return logits
        logits = logits.clip(-_HUGE, _HUGE)
        logits[self._bias_ids] += self._bias_values
        if self._seen is not None:
            ids = self._seen.ids
            penalty = np.float32(max(self.params.repetition_penalty, _TINY))
            values = logits[ids]
            with np.errstate(over="ignore"):
                logits[ids] = np.where(values < 0, values * penalty, values / penalty)
        if self._counts:
            ids = self._counts.ids
            logits[ids] -= np.float32(self.params.frequency_penalty) * self._counts.counts
            logits[ids] -= np.float32(self.params.presence_penalty)
        logits.clip(-_HUGE, _HUGE, out=logits)
        if self._mask is not None:
            bits = np.unpackbits(self._mask.view(np.uint8), count=len(logits), bitorder="little")
            logits[bits == 0] = _FORBIDDEN
        return logits


def sample(logits: Floats, draws: Sequence[Draw]) -> list[int]:
    """One token for each row of `logits` [rows, vocab]; `NON_FINITE` if they are not finite."""
    finite = finite_rows(logits)
    tokens: list[int] = []
    if all(draw.is_plain_greedy for draw in draws):
        tokens = logits.argmax(axis=1).tolist()
        return [token if ok else NON_FINITE for token, ok in zip(tokens, finite, strict=True)]
    for row, draw, ok in zip(logits, draws, finite, strict=True):
        tokens.append(draw.choose(row) if ok else NON_FINITE)
    return tokens


def finite_rows(logits: Floats) -> list[bool]:
    """For each row of `logits` [rows, vocab], whether all its values are finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        sums = logits.sum(axis=1)
    # A sum is not finite if an addend is not. Huge finite addends can overflow too: look again.
    finite: list[bool] = np.isfinite(sums).tolist()
    if all(finite):
        return finite
    return [ok or bool(np.isfinite(row).all()) for ok, row in zip(finite, logits, strict=True)]


def candidates(
    logits: Floats, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.int64] | None, Floats]:
    """The tokens to draw from, in the order of their ids, and their weights.

    `logits` [vocab] are already divided by the temperature and shifted so that the largest is 0.
    Weights are probabilities up to a common factor. The ids are None if all tokens remain. The most
    probable token always remains, and so do all tokens that tie at the k-th place.
    """
    ids, weights, _ = _candidates(logits, top_k, top_p, min_p)
    return ids, weights


def _candidates(
    logits: Floats, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.int64] | None, Floats, int]:
    """As `candidates`, and the number of tokens that were put in order for top-p."""
    ids: NDArray[np.int64] | None = None
    if 0 < top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    elif min_p > 0.0 and top_p >= 1.0:
        ids = np.flatnonzero(logits >= np.float32(np.log(min_p)))
    weights = np.exp(logits if ids is None else logits[ids])
    ordered = 0
    if top_p < 1.0:
        kept, ordered = _nucleus(weights, top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if min_p > 0.0 and ids is not None:
        kept = np.flatnonzero(weights >= np.float32(min_p))
        ids, weights = ids[kept], weights[kept]
    return ids, weights, ordered


def _nucleus(weights: Floats, top_p: float) -> tuple[NDArray[np.int64], int]:
    """Indices of the smallest set of largest weights whose share of the total reaches `top_p`.

    Also returns the number of weights that were put in order for it.
    """
    total = weights.sum(dtype=np.float64)
    # All weights below this bound sum to less than 1 - top_p of the total, so none of them is in
    # the set; the rest, usually a few of many thousand, is cheap to sort.
    maybe = np.flatnonzero(weights >= (1.0 - top_p) * total / len(weights))
    values = weights[maybe]
    # The sums need the values in order, but not their indices, and numpy sorts plain float32 values
    # many times faster than it sorts indices.
    ordered = np.sort(values)[::-1]
    before = ordered.astype(np.float64)
    np.add.accumulate(before, out=before)
    before -= ordered
    count = max(1, int(np.searchsorted(before, top_p * total)))
    kept = maybe[values >= ordered[count - 1]]
    if len(kept) > count:  # of weights that equal the smallest, the first by id remain
        equal = np.flatnonzero(weights[kept] == ordered[count - 1])
        kept = np.delete(kept, equal[count - len(kept) :])
    return kept, len(ordered)


def invert(weights: Floats, u: float) -> int:
    """The index at which the running sum of `weights` passes the fraction `u` of the total.

    Sums segments first, in float64, so that a large vocabulary needs no long running sum.
    """
    segments = np.add.reduceat(weights, np.arange(0, len(weights), _SEGMENT), dtype=np.float64)
    ends = np.cumsum(segments)
    target = u * ends[-1]
    segment = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    first = segment * _SEGMENT
    inside = np.cumsum(weights[first : first + _SEGMENT], dtype=np.float64)
    target -= ends[segment] - segments[segment]
    at = min(int(np.searchsorted(inside, target, side="right")), len(inside) - 1)
    while weights[first + at] == 0.0:
        at -= 1  # rounding led past the last token that has any weight
    return first + at


def uniform(seed: int, index: int) -> float:
    """The `index`-th random number of `seed`, in [0, 1): SplitMix64 from a scrambled seed."""
    state = (_scramble(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    return (_scramble(state) >> 11) * 2.0**-53


def _scramble(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def logprobs(logits: Floats, token: int, count: int) -> Logprobs:
    """The model's log-probability of `token`, and those of the `count` most probable tokens.

    `logits` [vocab] are raw: without temperature, bias or penalty.
    """
    largest = logits.max()
    total = np.exp(logits - largest).sum(dtype=np.float64)
    shift = np.float32(np.float64(largest) + np.log(total))
    top: list[tuple[int, float]] = []
    count = min(count, len(logits))
    if count:
        best = _largest(logits, count)
        best = best[np.lexsort((best, -logits[best]))]
        top = [(int(i), float(logits[i] - shift)) for i in best]
    return Logprobs(token, float(logits[token] - shift), top)


def _largest(logits: Floats, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest logits, of equals the first, in no order."""
    # Values alone are partitioned many times faster than indices.
    least = np.partition(logits, -count)[-count]
    found = np.flatnonzero(logits >= least)
    if len(found) > count:
        equal = np.flatnonzero(logits[found] == least)
        found = np.delete(found, equal[count - len(found) :])
    return found
