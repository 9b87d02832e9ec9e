"""Values of GGUF files are those of the `gguf` package, however many rows and threads there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from loraplex_model.checkpoints.gguf import values
from loraplex_model.checkpoints.gguf.values import dequantised


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0", "TQ2_0"])
@pytest.mark.parametrize("shape", [(256,), (1, 512), (7, 256), (3, 5, 256)])
def test_values_of_all_pieces(
    kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_AT_ONCE", 600)  # two rows of 256 at once
    chance = np.random.default_rng(len(shape))
    of = GGMLQuantizationType[kind]
    raw = quantize(chance.standard_normal(shape).astype(np.float32), of)
    found = dequantised(np.frombuffer(raw.tobytes(), np.uint8), shape, of)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), np.asarray(dequantize(raw, of)).reshape(shape))


def test_an_error_of_a_later_piece_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_AT_ONCE", 256)
    calls = 0

    def fail(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise ValueError("damaged")
        return dequantize(rows, kind)

    monkeypatch.setattr("gguf.quants.dequantize", fail)
    with pytest.raises(ValueError, match="damaged"):
        dequantised(np.zeros(4 * 1024, np.uint8), (4, 256), GGMLQuantizationType.F32)
