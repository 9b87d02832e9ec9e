"""Carries out a plan of `spellings`: reads a folder of another program and writes PEFT's files.

Pickles are never read. Weights in several files are joined into one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loraplex_model.base.durable import flush_file
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.convert.export.directory import write_json
from loraplex_adapters.convert.importers.spellings import (
    Plan,
    Rewriting,
    plan_mistral,
    plan_mlx,
    plan_peft,
)
from loraplex_adapters.format.config import load_config
from loraplex_adapters.format.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Directory,
    RegularFile,
    opened,
    refused,
)
from loraplex_adapters.format.foreign.folder import cause_of
from loraplex_adapters.format.header import ITEM_SIZE, Header, read_header
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import shown

MLX_WEIGHTS, MISTRAL_WEIGHTS = "adapters.safetensors", "lora.safetensors"
_MISTRAL_PARAMS = "params.json"
_SHARD = "adapter_model-"
_MAX_SHARDS = 64
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened weights file of the source."""

    file: RegularFile
    header: Header


def convert(
    source: Path,
    target: Path,
    base: BaseInfo,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    max_bytes: int,
) -> Plan:
    """Writes the adapter in `source` as PEFT's files into the new directory `target`.

    `rank` is compared with the tensors; `alpha` is used where the source states none. The result
    has not been checked against the base. A plan without lines changes nothing, and nothing is
    written.
    Raises Refusal: CONVERT_UNSUPPORTED; as reading an adapter does.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(opened(source))
        files = {name for name, is_folder in directory.listing() if not is_folder}
        sources = []
        for name in _weights(files, directory):
            file = stack.enter_context(directory.open(name, max_bytes))
            sources.append(_Source(file, _header(file)))
        if (total := sum(each.file.size for each in sources)) > max_bytes:
            message = f"the weights files have {total} bytes together; at most {max_bytes} are "
            raise Refusal(Reason.ADAPTER_TOO_LARGE, f"{message}accepted (--max-adapter-file)")
        tensors = _tensors(sources)
        plan = _plan(directory, files, tensors, base, alpha)
        if rank is not None and plan.config.get("r") != rank:
            message = f"the tensors have rank {plan.config.get('r')}, not {rank}; correct --rank"
            raise Refusal(Reason.FIELD_INVALID, message, "rank")
        if sources[0].file.name.startswith(_SHARD):
            line = f"{len(sources)} weights files are joined into one"
            if len(sources) == 1:
                line = f"{sources[0].file.name} becomes {WEIGHTS_FILE}"
            plan = Plan(plan.steps, plan.config, (*plan.lines, line))
        if plan.lines:
            _write(target, plan, sources)
    return plan


def _tensors(sources: Sequence[_Source]) -> list[TensorLocation]:
    """The tensors of all files. Raises Refusal if two files have one of the same name."""
    found: dict[str, str] = {}
    for source in sources:
        for tensor in source.header.tensors:
            other = found.setdefault(tensor.name, source.file.name)
            if other != source.file.name:
                message = f"{shown(tensor.name)} is in {other} and in {source.file.name}; remove "
                message += "the files that another saving left behind"
                raise Refusal(Reason.ADAPTER_INVALID, message, source.file.name)
    return [tensor for source in sources for tensor in source.header.tensors]


def _header(file: RegularFile) -> Header:
    try:
        return read_header(file.read, file.size)
    except Refusal as error:
        message = error.message.replace(WEIGHTS_FILE, file.name)
        raise Refusal(error.reason, message, file.name) from None


def _weights(files: set[str], directory: Directory) -> list[str]:
    """The files with the weights. Raises Refusal if there are none that can be read."""
    if WEIGHTS_FILE in files:
        return [WEIGHTS_FILE]
    shards = sorted(n for n in files if n.startswith(_SHARD) and n.endswith(".safetensors"))
    if shards:
        count = shards[0].removesuffix(".safetensors").rpartition("-of-")[2]
        if len(shards) > _MAX_SHARDS or count.lstrip("0") != str(len(shards)):
            message = f"weights files in the folder: {len(shards)}, by their names: "
            message += f"{shown(count.lstrip('0'))}; copy all of them (at most {_MAX_SHARDS})"
            raise Refusal(Reason.ADAPTER_INVALID, message, shards[0])
        return shards
    for name in (MLX_WEIGHTS, MISTRAL_WEIGHTS):
        if name in files:
            return [name]
    cause = cause_of(directory.listing)
    assert cause is not None, "a folder without weights has a cause"
    raise refused(cause)


def _plan(
    directory: Directory,
    files: set[str],
    tensors: Sequence[TensorLocation],
    base: BaseInfo,
    alpha: float | None,
) -> Plan:
    config = load_config(directory.read_config()) if CONFIG_FILE in files else {}
    names = [tensor.name for tensor in tensors]
    if all(name.endswith((".lora_a", ".lora_b", ".m")) for name in names):
        return plan_mlx(tensors, config, alpha)
    if MISTRAL_WEIGHTS in files or any(".feed_forward.w" in name for name in names):
        params = {}
        if _MISTRAL_PARAMS in files:
            with directory.open(_MISTRAL_PARAMS, MAX_CONFIG_BYTES) as file:
                params = load_config(file.read(0, file.size))
        return plan_mistral(tensors, params, base, alpha)
    if CONFIG_FILE not in files:
        cause = cause_of(directory.listing)
        assert cause is not None, "a folder without a configuration has a cause"
        raise refused(cause)
    return plan_peft(tensors, config)


def _write(target: Path, plan: Plan, sources: Sequence[_Source]) -> None:
    """Writes both files, one tensor after the other."""
    table: dict[str, object] = {}
    metadata: dict[str, str] = {}
    at = 0
    for source in sources:
        metadata.update(source.header.metadata)
        for tensor in source.header.tensors:
            step, size = plan.steps[tensor.name], tensor.end - tensor.start
            shape = tensor.shape[::-1] if step.transposed else tensor.shape
            offsets = [at, at + size]
            table[step.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": offsets}
            at += size
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **table}).encode()
    text += b" " * (-len(text) % 8)
    try:
        target.mkdir()
        write_json(target / CONFIG_FILE, plan.config)
        with open(target / WEIGHTS_FILE, "xb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for source in sources:
                for tensor in source.header.tensors:
                    for data in _bytes(source.file, tensor, plan.steps[tensor.name]):
                        out.write(data)
            flush_file(out)
    except OSError as error:
        message = f"the converted adapter cannot be written: {error.strerror}"
        raise Refusal(Reason.EXPORT_FAILED, message, "target") from None


def _bytes(file: RegularFile, tensor: TensorLocation, step: Rewriting) -> Iterator[bytes]:
    """A tensor's bytes in its new layout, whatever its dtype."""
    if not step.transposed and not step.heads:
        starts = range(tensor.start, tensor.end, _CHUNK)
        yield from (file.read(start, min(_CHUNK, tensor.end - start)) for start in starts)
        return
    data = file.read(tensor.start, tensor.end - tensor.start)
    values = np.frombuffer(data, f"V{ITEM_SIZE[tensor.dtype]}").reshape(tensor.shape)
    if step.heads:
        rows, width = tensor.shape
        pairs = values.reshape(step.heads, rows // step.heads // 2, 2, width)
        values = pairs.transpose(0, 2, 1, 3).reshape(rows, width)
    if step.transposed:
        values = values.T
    yield np.ascontiguousarray(values).tobytes()
