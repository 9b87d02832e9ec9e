"""Which decoder is chosen for a base model on CUDA, and what is said about it. No device needed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from loraplex_model.decoder import flash
from loraplex_model.decoder import open as opening
from loraplex_model.decoder.cuda import support


def weights(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, device: str = "cuda", experts: int = 0
) -> Any:
    embed = SimpleNamespace(device=torch.device(device), dtype=dtype)
    config = SimpleNamespace(head_dim=head_dim, num_experts=experts)
    return SimpleNamespace(embed=embed, config=config)


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the kernels run."""
    monkeypatch.setattr(support, "obstacle_to_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (64 << 30, 80 << 30))
    monkeypatch.setattr(support, "card_name", lambda *_: "card")
    monkeypatch.setenv("CC", "cc")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments and options of each decoder that was made, by stand-ins for modules of kernels."""
    found: list[Any] = []

    def make(*arguments: Any, **options: Any) -> str:
        found.append((arguments, options))
        return "cuda"

    decoder, graphs = ModuleType("decoder"), ModuleType("graphs")
    decoder.CudaDecoder = make  # type: ignore[attr-defined]
    graphs.GraphSizes = SimpleNamespace(up_to=lambda *sizes: sizes)  # type: ignore[attr-defined]
    for module in (decoder, graphs):
        name = f"loraplex_model.decoder.cuda.{module.__name__}"
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    return found


def opened(of: Any, tmp_path: Path, **options: Any) -> Any:
    return opening.open_decoder(of, 7, 3, max_positions=8, cache=tmp_path, **options)


@pytest.mark.usefixtures("capable")
def test_a_capable_device_gets_the_kernels_with_small_blocks(
    made: list[Any], tmp_path: Path
) -> None:
    sizes = opening.ServingSizes(max_rows=100, max_draws=9, max_rank=4)
    assert opened(weights(), tmp_path, serving=sizes) == "cuda"
    ((arguments, options),) = made
    assert arguments[1:] == (7, opening.block_size(weights()), 3)
    assert arguments[2] == 32
    assert options["max_rows"] == 100
    assert options["graphs"] == (9, 4)
    assert options["copy_bytes"] == 14 << 30
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "kernels" / "triton")


@pytest.mark.usefixtures("capable")
def test_graphs_can_be_left_out_and_a_few_passes_need_none(made: list[Any], tmp_path: Path) -> None:
    opened(weights(), tmp_path, serving=opening.ServingSizes(has_graphs=False))
    opened(weights(), tmp_path)
    assert [options["graphs"] for _, options in made] == [None, None]
    assert made[1][1]["copy_bytes"] == 0


@pytest.mark.usefixtures("capable")
def test_the_memory_for_copies_can_be_given(made: list[Any], tmp_path: Path) -> None:
    opened(weights(), tmp_path, serving=opening.ServingSizes(copy_bytes=0))
    opened(weights(), tmp_path, serving=opening.ServingSizes(copy_bytes=5))
    assert [options["copy_bytes"] for _, options in made] == [0, 5]


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize(
    ("of", "change", "why"),
    [
        (weights(head_dim=512), None, "512"),
        (weights(head_dim=75), None, "75, an odd number"),
        (weights(experts=8), None, "experts"),
        (weights(torch.float64), None, "float64"),
        (weights(), ("obstacle_to_triton", "the package triton is not installed"), "triton"),
    ],
    ids=["wide heads", "odd heads", "experts", "float64", "no triton"],
)
def test_what_the_kernels_do_not_take_is_computed_by_torch_with_a_warning(
    of: Any,
    change: tuple[str, str] | None,
    why: str,
    made: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(opening, "ReferenceDecoder", lambda *given: given)
    if change is not None:
        monkeypatch.setattr(support, change[0], lambda: change[1])
    with caplog.at_level(logging.WARNING):
        assert opened(of, tmp_path)[1:] == (7, flash.BLOCK, 3)
    assert made == []
    (record,) = caplog.records
    assert "many times slower" in record.getMessage()
    assert why in record.getMessage()


@pytest.mark.usefixtures("capable")
def test_an_old_device_or_one_without_a_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device, config = torch.device("cuda"), weights().config
    assert support.obstacle_to_kernels(device, torch.bfloat16, config) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compiler" in (support.obstacle_to_kernels(device, torch.bfloat16, config) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "7.5" in (support.obstacle_to_kernels(device, torch.bfloat16, config) or "")
