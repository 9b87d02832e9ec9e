"""What `loraplex-server doctor` says of the base model and of adapters for it.

The model is not converted: its configuration and the headers of its files are read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_model.base.refusal import Refusal

from loraplex_server.commands import doctor_adapters
from loraplex_server.commands.checks import Check
from loraplex_server.config import Config

if TYPE_CHECKING:
    import torch
    from loraplex_model.base.config import DecoderConfig
    from loraplex_model.checkpoints.outlook.base import BaseOutlook
    from loraplex_model.checkpoints.outlook.footprint import Footprint

_TOKENS: Final = 1000
"""Length of the sequences for which memory and times are given."""


def examine(config: Config, adapters: Sequence[Path], machine_bytes: int) -> Iterator[Check]:
    """Checks the base model, and each adapter in `adapters` against it.

    `machine_bytes` is the memory of the machine; 0 if it is unknown.
    """
    try:
        from loraplex_model.checkpoints.outlook.base import look
    except ImportError:  # without torch, which another check reports
        yield Check("model", _name(config))
        return
    try:
        found = look(config.model, config.cache)
    except Refusal as refusal:
        for problem in refusal.problems:
            yield Check("model", f"{_name(config)}: {problem.reason}: {problem.message}", False)
        return
    if found is None:
        yield Check("model", f"{_name(config)}, not on this machine: fetched at the first start")
        for directory in adapters:
            yield Check("adapter", f"{directory}: not checked, since the model has to be fetched")
        return
    yield Check("model", _model(config, found))
    yield from _features(found)
    yield from _resources(config, found, machine_bytes)
    for directory in adapters:
        yield from doctor_adapters.examine(config, found, directory)


def _name(config: Config) -> str:
    if config.model in ("", "default"):
        return "SmolLM2-135M-Instruct (default)"
    return config.model


def _model(config: Config, found: BaseOutlook) -> str:
    entries = len(list(config.cache.glob("entries/*/model.json")))
    kept = f"{entries} converted models in {config.cache}"
    name = f"{_name(config)}, {found.config.architecture}, will be served"
    if found.entry is not None:
        return f"{name}; converted already, in {found.entry}; {kept}"
    later = ", ".join(found.later)
    return f"{name}; converted at the first start, which also checks {later}; {kept}"


def _features(found: BaseOutlook) -> Iterator[Check]:
    from loraplex_model.checkpoints.outlook import features

    if found.stored_as:
        yield Check("stored as", found.stored_as)
    for subject, text in features.of_config(found.config).items():
        yield Check(subject, text)


def _resources(config: Config, found: BaseOutlook, machine_bytes: int) -> Iterator[Check]:
    import torch
    from loraplex_model.checkpoints.outlook.footprint import Footprint
    from loraplex_model.ops.devices import resolve
    from loraplex_model.ops.dtypes import BY_NAME

    sizes, dtype = Footprint.of(found.config), BY_NAME[config.dtype]
    device = resolve(config.engine_device)
    if device.type == "cuda":
        number = config.placements[0].number if config.placements else 0
        if not torch.cuda.is_available() or number >= torch.cuda.device_count():
            return  # another check reports it
        device = torch.device("cuda", number)
    decoder, is_native = _decoder(config, found.config, device, dtype)
    on_disk = f"{sizes.parameters:,} weights, {_gb(found.nf4)} in NF4 on the disk"
    if found.entry is None:
        on_disk += f"; the conversion takes at most {_gb(found.peak)} of memory"
    yield Check("size", on_disk)
    yield _memory(
        config,
        sizes,
        dtype.itemsize,
        is_native=is_native,
        is_cuda=device.type == "cuda",
        machine_bytes=machine_bytes,
    )
    if decoder:
        yield Check("decoder", decoder)
    yield _step(config, sizes, device, dtype)


def _memory(
    config: Config,
    sizes: Footprint,
    item_size: int,
    *,
    is_native: bool,
    is_cuda: bool,
    machine_bytes: int,
) -> Check:
    """Memory of the engines; not good if the machine has less of it."""
    from loraplex_server.engine.runner.sizing import given_blocks

    weights = sizes.in_memory(item_size, packed=is_native)
    token = sizes.kv * item_size
    text = f"{_gb(weights)} of weights in {config.dtype}, {_mb(_TOKENS * token)} of keys and values"
    text += f" for {_TOKENS:,} tokens"
    try:
        cached = given_blocks(config.runner_config(), 1, token) * token
    except Refusal as refusal:
        return Check("memory", refusal.message, good=False)
    if is_cuda and not (config.kv_memory or config.kv_tokens):
        return Check("memory", f"{text}; the cache gets what gpu_memory leaves")
    text += f", {_gb(cached)} for the cache of {cached // token:,} tokens"
    needed = config.engine_count * (weights + cached)
    if not is_cuda and 0 < machine_bytes < needed:
        text += f"; together {_gb(needed)}, but the machine has {_gb(machine_bytes)}: lower"
        return Check("memory", f"{text} kv_memory, or choose a smaller model", good=False)
    return Check("memory", text)


def _decoder(
    config: Config, base: DecoderConfig, device: torch.device, dtype: torch.dtype
) -> tuple[str, bool]:
    """What will compute, and whether it is the C++ decoder; "" if another check reports a fault."""
    from loraplex_model.decoder.cuda.support import obstacle_to_kernels
    from loraplex_model.ops import build

    if device.type == "cuda":
        why = obstacle_to_kernels(device, dtype, base)
        return (f"torch on CUDA, many times slower: {why}" if why else "Triton kernels"), False
    try:
        isa = build.chosen_isa()
    except Refusal:
        return "", False
    if build.is_built(isa, config.cache / "kernels"):
        return f"C++ for {isa}", True
    if shutil.which(os.environ.get("CXX", "c++")):
        return f"C++ for {isa}, compiled at the first start", True
    return "torch, many times slower: the C++ kernels need a compiler (g++)", False


def _step(config: Config, sizes: Footprint, device: torch.device, dtype: torch.dtype) -> Check:
    from loraplex_model.checkpoints.outlook.speed import measure

    from loraplex_server.config import available_cores

    threads = config.engine_threads or available_cores()
    try:
        speed = measure(device, dtype, threads)
    except RuntimeError as error:  # a device without memory, or in a mode that allows no use
        return Check("step time", f"not measured: {str(error).partition(chr(10))[0]}")
    tokens = min(_TOKENS, config.max_context or _TOKENS, sizes.config.max_positions)
    times = [
        f"{1000 * speed.step_seconds(sizes, rows, tokens, dtype.itemsize):.3g} ms for "
        f"{rows} sequence{'s' * (rows > 1)}"
        for rows in sorted({1, config.max_running})
    ]
    text = f"estimated, at least {' and '.join(times)} of {tokens:,} tokens: what a decode step "
    text += f"reads at {speed.read / 1e9:.1f} GB/s and multiplies at "
    return Check("step time", f"{text}{speed.multiplied / 1e9:.1f} G/s, measured just now")


def _gb(nbytes: float) -> str:
    return _mb(nbytes) if nbytes < 1e8 else f"{nbytes / 1e9:.2f} GB"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g} MB"
