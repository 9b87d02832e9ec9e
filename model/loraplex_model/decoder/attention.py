"""Causal grouped-query attention in torch: over the paged cache, or within a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch

from loraplex_model.adapters.delta import VirtualTokens
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import DecoderConfig
from loraplex_model.decoder import flash
from loraplex_model.ops import autograd, products
from loraplex_model.ops.linear import TILE

_PAD = 64  # keys are padded to a multiple of this, so that sums over them have one order


class Attention(Protocol):
    """Attention of one layer; each implementation has its own source of past keys and values.

    q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads * head_dim].
    """

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor: ...


class PagedAttention:
    """Attention of one batch over the cache, after adding the batch's keys and values to it."""

    def __init__(
        self,
        config: DecoderConfig,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        batch: ForwardBatch,
    ) -> None:
        """`keys` and `values` are [num_blocks, block_size, kv_heads, head_dim] for each layer."""
        self._config, self._keys, self._values, self._batch = config, keys, values, batch
        device, self._block_size = keys[0].device, keys[0].shape[1]
        self._positions = torch.from_numpy(batch.positions).to(device).long()
        self._tables = torch.from_numpy(batch.block_tables).to(device)
        self._starts = torch.from_numpy(batch.query_starts).to(device)
        self._lengths = torch.from_numpy(batch.context_lens).to(device)
        sequences = torch.repeat_interleave(
            torch.arange(len(batch.context_lens), device=device), self._starts.diff()
        )
        blocks = self._tables[sequences, self._positions // self._block_size].long()
        self._slots = blocks * self._block_size + self._positions % self._block_size
        self._flash = not config.attention_softcap and not flash.obstacle(
            device, keys[0].dtype, config.head_dim, self._block_size
        )
        if self._flash:
            self._key_starts = torch.nn.functional.pad(
                self._lengths.cumsum(0, dtype=torch.int32), (1, 0)
            )

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See `Attention`."""
        keys, values = self._keys[layer], self._values[layer]
        keys.flatten(0, 1)[self._slots] = k.to(keys.dtype)
        values.flatten(0, 1)[self._slots] = v.to(values.dtype)
        window = self._config.sliding_windows[layer]
        if self._flash:
            return self._all_at_once(q, keys, values, window)
        out = torch.empty_like(q)
        for s, length in enumerate(self._batch.context_lens.tolist()):
            rows = slice(int(self._batch.query_starts[s]), int(self._batch.query_starts[s + 1]))
            blocks = self._tables[s, : -(-length // self._block_size)].long()
            past_k = keys[blocks].flatten(0, 1)[:length].to(q.dtype)
            past_v = values[blocks].flatten(0, 1)[:length].to(q.dtype)
            scoring = Scoring.of(self._config, window)
            out[rows] = _by_tiles(q[rows], past_k, past_v, self._positions[rows], scoring)
        return out.flatten(1)

    def _all_at_once(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        batch = self._batch
        out = flash.attend(
            q,
            keys,
            values,
            query_starts=self._starts,
            key_starts=self._key_starts,
            lengths=self._lengths,
            tables=self._tables,
            most_queries=int((batch.query_starts[1:] - batch.query_starts[:-1]).max()),
            most_keys=int(batch.context_lens.max()),
            window=window,
            scale=self._config.attention_scale or None,
        )
        return out.flatten(1)


class PackedAttention:
    """Attention within whole sequences side by side, for training; differentiable.

    A sequence has no past, except keys and values of its adapter's virtual tokens. Scores are not
    kept: torch's fused attention computes them again in the backward pass (FlashAttention, Dao et
    al., arXiv 2205.14135). Adjacent sequences of equal length are one call.
    """

    def __init__(
        self,
        config: DecoderConfig,
        starts: Sequence[int],
        virtual: Sequence[VirtualTokens | None] = (),
    ) -> None:
        """Sequence s has the rows `starts[s]` to `starts[s + 1] - 1`.

        `virtual` are the virtual tokens before each sequence; empty if no sequence has any.
        """
        self._config = config
        self._starts = starts
        self._runs = _runs(starts, virtual or [None] * (len(starts) - 1))
        self._rows = torch.tensor(starts, dtype=torch.int32)
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See `Attention`."""
        config, window = self._config, self._config.sliding_windows[layer]
        if not (
            config.attention_softcap or flash.packed_obstacle(q.device, q.dtype, config.head_dim)
        ):
            return self._all_at_once(layer, q, k, v, window)
        if self._in_kernels(q):
            how = products.Attending(self._rows, window or 0, config.softmax_scale)
            return autograd.attend(q, k, v, how)
        parts = []
        for run in self._runs:
            rows = slice(run.start, run.start + run.count * run.length)
            q_, k_, v_ = (t[rows].view(run.count, run.length, *t.shape[1:]) for t in (q, k, v))
            past = 0
            if run.past is not None and run.past.keys is not None and run.past.values is not None:
                past = run.past.count
                k_ = torch.cat([_before(run, run.past.keys[layer], k_), k_], dim=1)
                v_ = torch.cat([_before(run, run.past.values[layer], v_), v_], dim=1)
            q_, k_, v_ = (t.transpose(1, 2) for t in (q_, k_, v_))  # [count, heads, length, width]
            total = past + run.length
            plain = not past and (window is None or window >= total)
            if config.attention_softcap or q.is_cuda:
                # torch's fused kernels take neither a mask nor float32 together with fewer key
                # heads; the one that would be chosen instead keeps all scores.
                shared = q.shape[1] // k.shape[1]
                k_, v_ = (t.repeat_interleave(shared, dim=1) for t in (k_, v_))
            if config.attention_softcap:
                mask = self._mask(past, run.length, window, q.device)
                out = _capped(q_, k_, v_, mask, config)
                parts.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
                continue
            out = torch.nn.functional.scaled_dot_product_attention(
                q_,
                k_,
                v_,
                attn_mask=None if plain else self._mask(past, run.length, window, q.device),
                is_causal=plain,
                scale=config.attention_scale or None,
                enable_gqa=q_.shape[1] != k_.shape[1],
            )
            parts.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_kernels(self, q: torch.Tensor) -> bool:
        """Whether the kernels for bfloat16 products on the CPU compute this attention."""
        return (
            q.dtype == torch.bfloat16
            and not q.is_cuda
            and not self._config.attention_softcap
            and all(run.past is None for run in self._runs)
            and products.available()
        )

    def _all_at_once(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """All sequences by one call of FlashAttention."""
        lengths = [run.length for run in self._runs for _ in range(run.count)]
        pasts = [_past(run) for run in self._runs for _ in range(run.count)]
        totals = [past + length for past, length in zip(pasts, lengths, strict=True)]
        if self._bounds is None:
            starts = (self._starts, [0, *accumulate(totals)])
            queries, keys = (torch.tensor(s, dtype=torch.int32, device=q.device) for s in starts)
            self._bounds = queries, keys
        if any(pasts):
            k, v = self._with_past(layer, k, v)
        out = flash.attend_packed(
            q,
            k,
            v,
            query_starts=self._bounds[0],
            key_starts=self._bounds[1],
            most_queries=max(lengths),
            most_keys=max(totals),
            window=window,
            scale=self._config.attention_scale or None,
        )
        return out.flatten(1)

    def _with_past(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with those of each sequence's virtual tokens before its own."""
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for run in self._runs:
            for first in range(run.start, run.start + run.count * run.length, run.length):
                if run.past is not None and run.past.keys is not None:
                    assert run.past.values is not None
                    past = run.past.keys[layer].to(k.dtype), run.past.values[layer].to(v.dtype)
                    parts.append(past)
                parts.append((k[first : first + run.length], v[first : first + run.length]))
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys), torch.cat(values)

    def _mask(
        self, past: int, length: int, window: int | None, device: torch.device
    ) -> torch.Tensor:
        """Mask of the positions that each token sees, bool [length, past + length]."""
        key = (past, length, window)
        if key not in self._masks:
            at = torch.arange(past + length, device=device)
            position = at[past:, None]
            seen = at <= position
            if window is not None:
                seen &= at > position - window
            self._masks[key] = seen
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` adjacent sequences of `length` tokens, from row `start` on, with the same past."""

    start: int
    count: int
    length: int
    past: VirtualTokens | None


def _runs(starts: Sequence[int], virtual: Sequence[VirtualTokens | None]) -> list[_Run]:
    runs: list[_Run] = []
    for (start, end), own in zip(pairwise(starts), virtual, strict=True):
        past = own if own is not None and own.keys is not None else None
        last = runs[-1] if runs else None
        if last and last.length == end - start and last.past is past:
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(_Run(start, 1, end - start, past))
    return runs


def _past(run: _Run) -> int:
    """Number of virtual tokens before each sequence of a run."""
    return 0 if run.past is None else run.past.count


def _before(run: _Run, past: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return past.to(own.dtype).expand(run.count, *past.shape)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores are made of queries and keys: `softcap(scale * q . k)` within a window.

    Attributes:
        window: positions that a query sees, its own included; None for all.
        softcap: c in `c * tanh(score / c)`; 0 for none.
    """

    window: int | None
    scale: float
    softcap: float = 0.0

    @staticmethod
    def of(config: DecoderConfig, window: int | None) -> Scoring:
        """The scoring of a layer with this window."""
        return Scoring(window, config.softmax_scale, config.attention_softcap)


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, config: DecoderConfig
) -> torch.Tensor:
    """Attention [count, heads, length, width] with capped scores, which torch's kernels lack.

    All scores are kept for the backward pass. `mask` is bool [length, keys].
    """
    cap = config.attention_softcap
    scores = torch.tanh(q @ k.transpose(-1, -2) * (config.softmax_scale / cap)) * cap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(
        -1, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return weights.to(q.dtype) @ v


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of one sequence, with scores and softmax in float32.

    Queries q [n, heads, d] are at `positions` [n], keys and values [m, kv_heads, d] at 0 to m - 1.
    Returns [n, heads, d] in the type of q.
    """
    n, heads, width = q.shape
    kv_heads = k.shape[1]
    at = torch.arange(k.shape[0], device=q.device)
    hidden = at[None, :] > positions[:, None]  # [n, m]
    if scoring.window is not None:
        hidden |= at[None, :] <= positions[:, None] - scoring.window
    grouped = q.float().view(n, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3)
    # [kv_heads, heads / kv_heads * n, m]
    scores = grouped.reshape(kv_heads, -1, width) @ k.float().permute(1, 2, 0) * scoring.scale
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.view(kv_heads, -1, n, k.shape[0]).masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1).view(kv_heads, -1, k.shape[0])
    mixed = (weights @ v.float().transpose(0, 1)).view(kv_heads, -1, n, width)
    result: torch.Tensor = mixed.permute(2, 0, 1, 3).reshape(n, heads, width).to(q.dtype)
    return result


def _by_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """`attend` in calls whose shapes do not depend on how the prompt was cut into chunks.

    Each call has `TILE` queries, and the keys up to the last of them, padded to a multiple of 64.
    """
    out = torch.empty_like(q)
    for start in range(0, q.shape[0], TILE):
        rows = positions[start : start + TILE]
        missing = TILE - len(rows)
        seen = int(rows[-1]) + 1
        padding = (0, 0, 0, 0, 0, -seen % _PAD)
        tile = torch.nn.functional.pad(q[start : start + TILE], (0, 0, 0, 0, 0, missing))
        part = attend(
            tile,
            torch.nn.functional.pad(k[:seen], padding),
            torch.nn.functional.pad(v[:seen], padding),
            torch.nn.functional.pad(rows, (0, missing)),
            scoring,
        )
        out[start : start + TILE] = part[: len(rows)]
    return out
