"""Attention of training on CUDA: one call for all sequences, with the numbers of the plain one.

torch's function is replaced by its documented meaning, so no CUDA device is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from loraplex_model.adapters.delta import VirtualTokens
from loraplex_model.decoder import flash
from loraplex_model.decoder.attention import PackedAttention
from model.conftest import Load
from torch.nn.attention import varlen

HEADS, KV_HEADS, WIDTH = 4, 2, 2


class VarlenAttention:
    """torch's `varlen_attn` as documented: the last query of a sequence sees up to its last key."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        self.calls += 1
        assert enable_gqa
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        assert (len(query), len(key)) == (int(cu_seq_q[-1]), int(cu_seq_k[-1]))
        assert window_size[1] == 0
        spans = zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True)
        return torch.cat(
            [
                self._one(
                    query[slice(*rows)], key[slice(*all_)], value[slice(*all_)], window_size, scale
                )
                for rows, all_ in spans
            ]
        )

    def _one(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window_size: tuple[int, int],
        scale: float | None,
    ) -> torch.Tensor:
        n, m = len(q), len(k)
        at, positions = torch.arange(m), torch.arange(m - n, m)[:, None]
        seen = at <= positions
        if window_size[0] >= 0:
            seen &= at >= positions - window_size[0]
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) * (scale or q.shape[2] ** -0.5)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, v)


@pytest.fixture
def torch_function(monkeypatch: pytest.MonkeyPatch) -> Iterator[VarlenAttention]:
    """torch's function, as if there were a CUDA device that has it."""
    function = VarlenAttention()
    monkeypatch.setattr(varlen, "varlen_attn", function)
    monkeypatch.setattr(flash, "packed_obstacle", lambda *_: None)
    return function


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("window", "scale"), [(None, 0), (1, 0), (3, 0.7), (100, 0)])
@pytest.mark.parametrize(
    ("starts", "past"),
    [
        ([0, 1], [0]),
        ([0, 6, 12, 15], [0, 0, 0]),
        ([0, 4, 8, 10], [3, 3, 0]),
        ([0, 5, 9, 14, 15], [0, 3, 3, 3]),
    ],
)
def test_one_call_has_the_numbers_and_gradients_of_the_plain_attention(
    starts: list[int],
    past: list[int],
    window: int | None,
    scale: float,
    load_tiny: Load,
    monkeypatch: pytest.MonkeyPatch,
    torch_function: VarlenAttention,
) -> None:
    torch.manual_seed(len(starts) + (window or 0))
    config = load_tiny("llama").weights.config
    config = replace(config, sliding_windows=(window,) * 3, attention_scale=scale)
    q, k, v = normal(starts[-1], HEADS, WIDTH), *(normal(starts[-1], KV_HEADS, WIDTH) for _ in "kv")
    keys, values = (normal(3, 3, KV_HEADS, WIDTH) for _ in "kv")
    prefix = VirtualTokens(keys=keys, values=values)
    given = [q, k, v, keys, values]
    weights = torch.randn(starts[-1], HEADS * WIDTH, dtype=torch.float64)

    def compute() -> tuple[torch.Tensor, ...]:
        attention = PackedAttention(config, starts, [prefix if n else None for n in past])
        found = attention(1, q, k, v)
        return found, *torch.autograd.grad((found * weights).sum(), given, allow_unused=True)

    ours = compute()
    assert torch_function.calls == 1
    monkeypatch.undo()
    for one, other in zip(ours, compute(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_what_torch_lacks_or_refuses_is_an_obstacle() -> None:
    cuda = torch.device("cuda", 0)
    assert "cpu" in str(flash.packed_obstacle(torch.device("cpu"), torch.bfloat16, 64))
    assert "float32" in str(flash.packed_obstacle(cuda, torch.float32, 64))
    assert "width of 260" in str(flash.packed_obstacle(cuda, torch.bfloat16, 260))
    assert flash._missing(flash._PACKED_OPTIONS) is None
    assert "no_such_option" in str(flash._missing(frozenset({"no_such_option"})))
