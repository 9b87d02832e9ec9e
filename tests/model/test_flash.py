"""Paged attention on CUDA, with torch's function replaced by one that has its known faults; R6."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.refusal import Refusal
from loraplex_model.base.weights import BLOCK
from loraplex_model.checkpoints import load
from loraplex_model.decoder import attention, flash
from loraplex_model.decoder import open as opening
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops import known_faults, nf4
from loraplex_model.ops.linear import DequantisedLinear, FusedLinear
from torch.nn.attention import varlen

from model import tiny

pytestmark = pytest.mark.fault("paged-attention-splits")

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    flash._missing.cache_clear()
    flash._too_old.cache_clear()
    yield
    flash._missing.cache_clear()
    flash._too_old.cache_clear()


def faulty_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """What torch 2.13 computes, with pytorch#194167: if the keys are split, the rows of all
    sequences but the first stay as they were. Also refuses what FlashAttention refuses."""
    assert enable_gqa
    assert seqused_k is not None
    assert block_table is not None
    assert cu_seq_k is not None
    for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    count = len(seqused_k)
    assert cu_seq_q.shape == cu_seq_k.shape == (count + 1,)
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    assert max_q == cu_seq_q.diff().max()
    assert max_k == seqused_k.max()
    assert key.shape[1] % flash.BLOCK == 0
    left, right = window_size
    assert right in (-1, 0)
    out = torch.full_like(query, float("nan"))
    for s in range(count if num_splits == 1 else 1):
        rows = slice(int(cu_seq_q[s]), int(cu_seq_q[s + 1]))
        used = int(seqused_k[s])
        blocks = block_table[s, : -(-used // key.shape[1])].long()
        positions = torch.arange(used - (rows.stop - rows.start), used)
        if right < 0:
            positions = torch.full_like(positions, used - 1)  # every query sees all keys
        out[rows] = attention.attend(
            query[rows],
            key[blocks].flatten(0, 1)[:used],
            value[blocks].flatten(0, 1)[:used],
            positions,
            attention.Scoring(None if left < 0 else left + 1, scale or query.shape[-1] ** -0.5),
        )
    return out


def logits(weights: Any) -> torch.Tensor:
    """Prompts, a chunk that continues one of them beside decode rows, and decode rows only."""
    decoder = ReferenceDecoder(weights, 8, flash.BLOCK, 1, keep_dense=True)
    prompts: list[tuple[list[int], int, list[int], Any]] = [
        ([(5 * s + i) % tiny.VOCAB for i in range(3 + 2 * s)], 0, [s], ()) for s in range(6)
    ]
    first = decoder.forward(ForwardBatch.build(prompts))
    more = [([7 + s] * (1 + 3 * (s == 4)), len(p[0]), [s], ()) for s, p in enumerate(prompts)]
    last = [([9 + s], p[1] + len(p[0]), [s], ()) for s, p in enumerate(more)]
    return torch.cat([first, *(decoder.forward(ForwardBatch.build(p)) for p in (more, last))])


@pytest.mark.parametrize(
    ("variant", "scale"), [("llama", 0), ("llama", 0.7), ("mistral-window", 0)]
)
def test_every_sequence_of_a_small_batch_is_written(
    variant: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.write(variant, tmp_path / "model")
    weights = load.load_base(str(checkpoint), torch.float32, tmp_path / "cache").weights
    weights = replace(weights, config=replace(weights.config, attention_scale=scale))
    plain = logits(weights)
    calls: list[dict[str, Any]] = []

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return faulty_varlen_attn(*arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    monkeypatch.setattr(flash, "obstacle", lambda *_: None)
    torch.testing.assert_close(logits(weights), plain, rtol=1e-4, atol=1e-4)
    layers = weights.config.num_layers
    assert len(calls) == 3 * layers
    assert {options["num_splits"] for options in calls} == {1}
    # Only without a window on the right are the query heads of a group computed together, and only
    # a pass of decode rows can do without it.
    windows = weights.config.sliding_windows
    sides = [options["window_size"] for options in calls]
    assert all(right == 0 for _, right in sides[: 2 * layers])
    assert sides[2 * layers :] == [(-1, -1) if w is None else (w - 1, 0) for w in windows]


def test_the_installed_torch_takes_every_argument() -> None:
    assert flash._missing(flash._OPTIONS) is None


def usable(**changes: Any) -> str | None:
    good = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 64, "block_size": flash.BLOCK}
    return flash.obstacle(**(good | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": torch.device("cpu")}, "cpu"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 60}, "60"),
        ({"head_dim": 264}, "264"),
        ({"block_size": 16}, "16"),
    ],
)
def test_what_flash_attention_refuses_uses_the_fallback(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert usable() is None
    assert why in (usable(**changes) or "")


def test_an_old_device_or_torch_uses_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "7.5" in (usable() or "")

    def of_2_11(q: Any, k: Any, v: Any, cu_seq_q: Any, window_size: Any = (-1, -1)) -> None:
        """The function before it could read a paged cache."""

    monkeypatch.setattr(varlen, "varlen_attn", of_2_11)
    flash._missing.cache_clear()
    assert "block_table, enable_gqa, num_splits, scale, seqused_k" in (usable() or "")


def test_the_fallback_is_logged_once_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "ReferenceDecoder", lambda *_: "decoder")
    monkeypatch.setattr(opening.support, "obstacle_to_triton", lambda: "there is no Triton")
    embed = SimpleNamespace(device=CUDA, dtype=torch.float32)
    weights: Any = SimpleNamespace(embed=embed, config=SimpleNamespace(head_dim=64))
    with caplog.at_level(logging.WARNING):
        opening.open_decoder(weights, 1, 1, max_positions=8, cache=Path())
    (record,) = caplog.records
    assert "many times slower" in record.getMessage()
    assert "float32" in record.getMessage()


def test_rows_without_whole_blocks_do_not_fail_the_fused_product() -> None:
    """`bitsandbytes` is not asked, so this needs no device."""
    matrix = nf4.quantise(torch.randn(8, BLOCK + 16))
    x = torch.randn(3, BLOCK + 16)
    with torch.no_grad():
        assert torch.equal(FusedLinear()(matrix, x), DequantisedLinear()(matrix, x))


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(known_faults, "version_of", lambda package: versions.get(package, ""))


@pytest.mark.parametrize(
    ("torch_version", "device", "refused"),
    [
        ("2.13.0+cpu", "cpu", False),
        ("2.13.0+cu130", "cuda", False),
        ("2.12.0a0+git1234", "cuda", False),
        ("2.11.0+cu130", "cuda", False),
        ("2.5", "cpu", False),
        ("2.5.0.dev20240901", "cpu", False),
        ("2.4.1", "cpu", True),
        ("2.4.1+cu121", "cuda", True),
        ("1.13.1", "cpu", True),
        ("3.0", "cuda", False),
    ],
)
def test_versions_that_cannot_be_used_are_refused_with_what_to_do(
    torch_version: str, device: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, torch=torch_version, bitsandbytes="0.50.2")
    if not refused:
        known_faults.check(device)
        return
    with pytest.raises(Refusal, match=r"install torch>=2\.5") as caught:
        known_faults.check(device)
    assert caught.value.reason == "PACKAGE_UNSUPPORTED"
    assert torch_version in caught.value.message


def test_a_version_that_has_no_repair_is_refused_by_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = known_faults.PackageFault("torch", "2.14", "", "cuda", "it computes nonsense")
    monkeypatch.setattr(known_faults, "PACKAGE_FAULTS", (fault,))
    pretend(monkeypatch, torch="2.14.1")
    known_faults.check("cpu")
    with pytest.raises(Refusal, match=r"nonsense; install one before 2\.14"):
        known_faults.check("cuda")


def test_without_bitsandbytes_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_faults.importlib.util, "find_spec", lambda _: None)
    known_faults.check("cpu")
    with pytest.raises(Refusal, match="--device cpu") as caught:
        known_faults.check("cuda")
    assert caught.value.reason == "PACKAGE_UNSUPPORTED"


def test_no_base_model_is_loaded_with_packages_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every program loads its base by this function."""
    pretend(monkeypatch, torch="2.4.0")
    with pytest.raises(Refusal, match="enable_gqa"):
        load.load_base(str(tmp_path), torch.float32, tmp_path / "cache")


def test_cudnn_does_not_compute_attention_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives NaN gradients and wrong results on some devices (see the table)."""
    calls: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    known_faults.avoid("cpu")
    assert calls == []
    known_faults.avoid("cuda")
    assert calls == [False]
