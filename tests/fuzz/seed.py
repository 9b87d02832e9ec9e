"""Writes the corpus: a sound input of every kind, and broken ones that found something once.

    PYTHONPATH=tests python tests/fuzz/seed.py

Inputs that a fuzzer's run has found are added by hand, with a name that says what they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from adapters.adapter_files import safetensors_bytes, weights_bytes
from adapters.kind_files import SAMPLES
from fuzz.targets import join

CORPUS = Path(__file__).with_name("corpus")

BROKEN_CONFIGS = {
    "deep": b"[" * 3000,
    "duplicate": b'{"peft_type": "LORA", "r": 8, "r": 999999}',
    "expression": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["x"], '
    b'"rank_pattern": {"(a+)+$": 1}, "exclude_modules": "(.*)*x"}',
    "infinity": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1e999}',
    "not-utf8": b'{"peft_type": "\xff"}',
    "surrogate": b'{"peft_type": "\\ud800", "\\ud800": 1}',
}

BROKEN_HEADERS = {
    "beyond": (1000).to_bytes(8, "little") + b"{}",
    "gap": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8
    ),
    "huge": (2**63).to_bytes(8, "little") + b"{}",
    "overflow": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "pickle": b"\x80\x04\x95\0\0\0\0\0\0\0\0",
    "zero": safetensors_bytes({"a": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}, b""),
}


def inputs() -> dict[Path, bytes]:
    """Every file of the corpus that this script writes."""
    files = {CORPUS / "config" / name: data for name, data in BROKEN_CONFIGS.items()}
    files |= {CORPUS / "header" / name: data for name, data in BROKEN_HEADERS.items()}
    for name, (config, tensors) in SAMPLES.items():
        text = json.dumps(config).encode()
        weights = weights_bytes(tensors)
        files[CORPUS / "config" / name] = text
        files[CORPUS / "adapter" / name] = join(text, weights)
        header = weights[: 8 + int.from_bytes(weights[:8], "little")]
        files[CORPUS / "header" / name] = header
    return files


if __name__ == "__main__":
    for path, data in inputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
