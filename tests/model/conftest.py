"""Fixtures of the model's tests: decoders, loaded tiny models, the real default model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import IS_INTERPRETED
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.decoder.reference import ReferenceDecoder

from model import tiny


def _native() -> Any:
    """The native decoder's class, or the reason why there is none."""
    try:
        from loraplex_model.decoder.native import NativeDecoder
        from loraplex_model.ops import build
    except ImportError as error:
        return f"no native decoder: {error}"
    try:
        build.load()
    except Exception as error:
        return f"no kernels: {error}"
    return NativeDecoder


# The kernels for CUDA run in Triton's interpreter, where there is one: see `make test-triton`.
DECODERS = ["reference", "native", *(["cuda"] if IS_INTERPRETED else [])]

# The interpreter takes half a second for the smallest pass, so some tests run with some of their
# parameters only, and those of `LEFT_OUT` not at all: their passes are like those of the others.
LEFT_OUT = {"test_token_by_token", "test_every_kind_changes_its_rows"}
CASES: dict[str, dict[str, tuple[Any, ...]]] = {
    "test_prompts_in_chunks_among_decode_rows": {
        "variant": ("llama", "mistral-window", "qwen2-window", "qwen3-window-bias"),
    },
    "test_preempted_and_resumed": {"variant": ("llama",)},
    "test_native_equals_the_reference": {
        "variant": ("llama", "llama-odd-sizes", "qwen3-window-bias"),
    },
    "test_neighbours_of_every_kind_change_no_bit": {"variant": ("llama", "qwen3-window-bias")},
    "test_merged_rows_agree_and_others_keep_their_bits": {"variant": ("llama-odd-sizes",)},
    "test_virtual_tokens_stand_before_a_prompt": {"variant": ("llama-tied-bias",)},
    "test_neighbours_change_no_bit": {"neighbours": (13,)},
    "test_chunks_change_no_bit": {"variant": ("llama",), "chunks": ((5, 16), (2, 3, 11, 5))},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_left_out(item: pytest.Item) -> bool:
    given = getattr(item, "callspec", None)
    if given is None or given.params.get("decoder_class") != "cuda":
        return False
    name = getattr(item, "originalname", "")
    allowed = CASES.get(name, {})
    return name in LEFT_OUT or any(
        given.params[key] not in values for key, values in allowed.items()
    )


@pytest.fixture(params=DECODERS)
def decoder_class(request: pytest.FixtureRequest) -> Any:
    """`(weights, num_blocks, block_size, num_slots) -> decoder`, each implementation in turn."""
    if request.param == "cuda":
        from loraplex_model.decoder.cuda.decoder import CudaDecoder

        return partial(CudaDecoder, max_rows=64, max_draws=8)
    if request.param == "reference":
        return partial(ReferenceDecoder, keep_dense=True)
    native = _native()
    if isinstance(native, str):
        pytest.skip(native)
    return native


Load = Callable[..., LoadedBase]


@pytest.fixture(scope="session")
def load_tiny(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`(variant, dtype) -> LoadedBase`, each variant written and converted once."""
    root = tmp_path_factory.mktemp("tiny")

    def load(variant: str, dtype: torch.dtype = torch.float32) -> LoadedBase:
        directory = root / variant
        if not directory.exists():
            tiny.write(variant, directory)
        return load_base(str(directory), dtype, root / "cache")

    return load


@pytest.fixture(scope="session")
def default_gguf(default_cache: Path) -> Path:
    """The real default model, fetched once for the whole checkout."""
    from loraplex_model.checkpoints.default_model import ensure_default_model

    return ensure_default_model(default_cache)


@pytest.fixture(scope="session")
def default_cache() -> Path:
    """The cache that `make demo` uses too."""
    return Path(__file__).parents[2] / "var" / "cache"
