"""What the fuzzer throws bytes at, and what has to hold whatever the bytes are.

Each target takes bytes and returns nothing; it raises for a broken promise: any exception but
Refusal where one is documented, a report that is neither a spec nor findings, a tensor that
disappeared, a message that is not fit to be shown.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from adapters.adapter_files import base_info
from loraplex_adapters.format.config import parse_config
from loraplex_adapters.format.examine import Report, examine
from loraplex_adapters.format.header import Header, read_header
from loraplex_adapters.format.kinds.variants import TRAINING_ENDINGS
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.refusal import Problem, Refusal

BASE = base_info(tie_embeddings=True)
LIMITS = AdapterLimits(max_rank=64, max_weights_bytes=1 << 20, max_virtual_tokens=64)
SKIPPED = ("base_layer.weight", "_proj.randlora_A", "_proj.randlora_B", *TRAINING_ENDINGS)
"""What a file may hold without effect: copies of the base's own weights and of shared tensors, and
tensors that are read in training only."""

BY_TASK = ("prefix_task_cols", "prefix_task_rows", "poly_router.module_logits")
"""Tensors of which a part is placed, that of the served task."""


def fuzz_config(data: bytes) -> None:
    """adapter_config.json of any bytes."""
    settings, findings = parse_config(data)
    assert settings is not None or findings
    _check_shown(findings)


def fuzz_header(data: bytes) -> None:
    """A weights file of any bytes."""
    try:
        header = read_header(lambda at, n: data[at : at + n], len(data))
    except Refusal as error:
        _check_shown(error.problems)
        return
    end = header.data_start
    for tensor in header.tensors:
        assert tensor.start == end
        assert tensor.end >= tensor.start
        end = tensor.end
    assert end == len(data)


def fuzz_adapter(data: bytes) -> None:
    """A directory: two bytes of length, the configuration, and the rest is the weights."""
    config, weights = split(data)
    with tempfile.TemporaryDirectory(prefix="loraplex-fuzz-", dir=_memory()) as name:
        directory = Path(name)
        (directory / "adapter_config.json").write_bytes(config)
        (directory / "adapter_model.safetensors").write_bytes(weights)
        report = examine(directory, BASE, LIMITS)
    assert (report.spec is None) == bool(report.findings)
    _check_shown(report.findings)
    if report.spec is not None:
        header = read_header(lambda at, n: weights[at : at + n], len(weights))
        _check_whole(report, header)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": fuzz_config,
    "header": fuzz_header,
    "adapter": fuzz_adapter,
}


def join(config: bytes, weights: bytes) -> bytes:
    """One input of the target "adapter"."""
    return len(config).to_bytes(2, "little") + config + weights


def split(data: bytes) -> tuple[bytes, bytes]:
    """The configuration and the weights of `join`, or of any bytes."""
    end = 2 + int.from_bytes(data[:2], "little")
    return data[2:end], data[end:]


def _check_whole(report: Report, header: Header) -> None:
    assert report.spec is not None
    placed = {t for m in report.spec.modules for t in m.tensors.values()}
    parts = {t.name for t in placed if t.name.endswith(BY_TASK)}
    left = {t for t in header.tensors if t not in placed and t.start < t.end}
    assert all(t.name.endswith(SKIPPED) or t.name in parts for t in left)
    assert report.spec.packed_bytes > 0
    assert report.spec.digest.startswith("sha256:")
    assert report.spec.virtual_tokens <= LIMITS.max_virtual_tokens
    assert all(m.rank <= LIMITS.max_rank for m in report.spec.modules)
    assert all(abs(m.scale) <= LIMITS.max_scale for m in report.spec.modules)
    json.dumps(dict(report.spec.provenance))


def _check_shown(findings: tuple[Problem, ...] | list[Problem]) -> None:
    assert len(findings) <= 1000
    for finding in findings:
        assert finding.reason.replace("_", "").isalpha()
        assert finding.message.isascii()
        assert finding.message.isprintable()
        assert len(finding.message) < 1000


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
