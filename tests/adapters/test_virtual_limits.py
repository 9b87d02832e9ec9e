"""Virtual tokens that leave no room in the context are refused wherever an adapter enters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters.adapter_files import BASE, write_adapter
from adapters.kind_files import SAMPLES
from loraplex_adapters.format.examine import examine, examine_header, inspect
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Store
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Refusal
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import build

from model import tiny

pytestmark = pytest.mark.fault("virtual-tokens-beyond-context")

POSITIONS = BASE.config.max_positions
KINDS = ("prompt", "p-tuning", "prefix")


def write(directory: Path, kind: str, count: int, config: DecoderConfig = BASE.config) -> Path:
    """An adapter with `count` virtual tokens for a base."""
    width = config.hidden_size
    settings: dict[str, Any] = {**SAMPLES[kind][0], "num_virtual_tokens": count}
    if kind == "prefix":
        width = 2 * config.num_layers * config.kv_size
        settings |= {"num_layers": config.num_layers, "num_attention_heads": config.num_kv_heads}
        settings |= {"token_dim": config.kv_size}
    settings.pop("token_dim", None)
    tensors = {"prompt_embeddings": np.ones((count, width), np.float32)}
    return write_adapter(directory, settings, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [None, 20, 10 * POSITIONS])
def test_virtual_tokens_leave_a_position_for_the_prompt_and_one_for_the_answer(
    kind: str, context: int | None, tmp_path: Path
) -> None:
    limits = AdapterLimits(max_context=context)
    most = min(context or POSITIONS, POSITIONS) - 2
    assert inspect(write(tmp_path / "fits", kind, most), BASE, limits).virtual_tokens == most
    for look in (examine, examine_header):
        report = look(write(tmp_path / "larger", kind, most + 1), BASE, limits)
        assert report.spec is None
        (problem,) = report.findings
        assert (problem.reason, problem.field) == ("ADAPTER_TOO_LARGE", "num_virtual_tokens")
        assert "max_context" in problem.message
        assert str(most) in problem.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_refuses_virtual_tokens_without_positions_in_its_base(
    kind: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", kind, POSITIONS)
    with pytest.raises(Refusal, match="max_context") as caught:
        Store(tmp_path / "store").register("soft", source, BASE)
    assert caught.value.reason == "ADAPTER_TOO_LARGE"


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_with_a_shorter_context_than_before_does_not_load_it(
    kind: str, tmp_path: Path
) -> None:
    """Registered while there was room, then `max_context` or the KV cache became smaller."""
    checkpoint = tiny.write("llama", tmp_path / "model")
    settings: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "cache": "var/cache",
        "max_context": 0,
        "kv_tokens": 512,
        "kv_memory": 0,
        "adapter_memory": 1 << 24,
        "max_rank": 16,
        "virtual_tokens": 512,
        "max_virtual_tokens": 512,
    }
    runner = build(RunnerConfig(**settings))
    source = write(tmp_path / "source", kind, 40, runner.info.base.config)
    digest = inspect(source, runner.info.base).digest
    ref = AdapterRef(digest, str(source))
    assert runner.read_adapter(ref).virtual_tokens == 40
    for less in ({"max_context": 41}, {"kv_tokens": 32}):
        with pytest.raises(Refusal, match="max_context") as caught:
            build(RunnerConfig(**settings | less)).read_adapter(ref)
        assert caught.value.reason == "ADAPTER_TOO_LARGE"
