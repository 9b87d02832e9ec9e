"""Settings of the runner: what a server's configuration says to the model's process. No torch."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

CPU_KV_BYTES = 512 << 20
"""Size of the KV cache on a CPU if the settings give none."""


class RunnerConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="local"
):
    """Settings of the local runner; sizes are bytes.

    Attributes:
        model: a directory, a GGUF file, a hub id, or "default".
        dtype: type of computation; base weights are NF4 in any case.
        device: "auto" takes CUDA if there is a device.
        threads: compute threads; 0 takes all cores.
        cache: directory of quantised models and compiled kernels.
        max_context: longest prompt and answer in tokens; 0 takes the model's.
        kv_tokens: size of the KV cache in tokens; 0 derives it from `kv_memory`.
        kv_memory: bytes of the KV cache; 0 takes 512 MiB on a CPU, and on CUDA what `gpu_memory`
            leaves.
        gpu_memory: fraction of a CUDA device's memory that may be in use by all processes.
        adapter_memory: bytes for adapters on the device.
        host_adapter_memory: bytes for adapters in host memory.
        merge_memory: bytes for dense copies.
        merge_dtype: type of the dense copies.
        virtual_tokens: KV tokens set aside for the virtual tokens of all adapters.
        max_virtual_tokens: virtual tokens that one adapter may have.
        max_rank: rank that one adapter may have.
        max_adapter_file: bytes that an adapter's weights file may have.
        token_budget: tokens that one pass may have.
        max_running: requests that take part in a pass.
        cuda_graphs: on CUDA, capture the launches of decode passes as graphs.
    """

    model: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    cache: str
    max_context: int
    kv_tokens: int
    kv_memory: int
    adapter_memory: int
    max_rank: int
    max_adapter_file: int = 4 << 30
    host_adapter_memory: int = 0
    merge_memory: int = 0
    merge_dtype: Literal["float32", "bfloat16"] = "float32"
    virtual_tokens: int = 0
    max_virtual_tokens: int = 0
    gpu_memory: float = 0.9
    token_budget: int = 512
    max_running: int = 64
    cuda_graphs: bool = True


class CustomRunner(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="custom"):
    """A runner from elsewhere, such as a test's: `factory` is "module:function".

    The function is called with `options` as keyword arguments and returns a `ModelRunner`.
    """

    factory: str
    options: dict[str, Any] = {}
