"""The size of the KV cache: given by the settings, or what the device's memory leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.runner.config import CPU_KV_BYTES, RunnerConfig

_COPIES = 4  # this part of the memory that is left is for copies of the base's matrices


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device's memory.

    Attributes:
        total: all of it.
        elsewhere: taken by other processes, and by CUDA itself, before this process took any.
        taken: what this process takes in addition to the KV cache, by purpose.
    """

    total: int
    elsewhere: int
    taken: Mapping[str, int]


def token_bytes(config: DecoderConfig, item_size: int) -> int:
    """Bytes of one token's keys and values in all layers; `item_size` is that of the KV type."""
    return 2 * config.num_layers * config.kv_size * item_size


def given_blocks(config: RunnerConfig, block_size: int, bytes_of_token: int) -> int:
    """KV blocks for requests by the settings alone. Raises `Refusal` if they hold no block."""
    tokens = config.kv_tokens or (config.kv_memory or CPU_KV_BYTES) // bytes_of_token
    if tokens < block_size:
        raise Refusal(
            Reason.KV_TOO_SMALL,
            f"the KV cache holds {tokens} tokens and needs at least {block_size}: raise kv_memory "
            f"(a token takes {bytes_of_token} bytes) or kv_tokens",
        )
    return tokens // block_size


def blocks_left(
    config: RunnerConfig, memory: DeviceMemory, block_size: int, bytes_of_token: int, prefix: int
) -> int:
    """KV blocks for requests in what `gpu_memory` of the device leaves, without `prefix` blocks.

    If the settings give a size, it is that size, and it must fit. Raises `Refusal`, with the sizes
    of all parts, if it does not, or if no block is left.
    """
    block_bytes = block_size * bytes_of_token
    limit = int(memory.total * config.gpu_memory)
    room = limit - memory.elsewhere - sum(memory.taken.values())
    fitting = room // block_bytes - prefix
    wanted = 0
    if config.kv_tokens or config.kv_memory:
        wanted = given_blocks(config, block_size, bytes_of_token)
    if fitting < max(wanted, 1):
        parts = {"other processes and CUDA": memory.elsewhere, **memory.taken}
        listed = ", ".join(f"{name} {_mib(nbytes)}" for name, nbytes in parts.items())
        needed = (max(wanted, 1) + prefix) * block_bytes
        raise Refusal(
            Reason.KV_TOO_SMALL,
            f"of the device's {_mib(memory.total)} this server may use {_mib(limit)} (gpu_memory "
            f"{config.gpu_memory:g}), and the KV cache needs {_mib(needed)} in addition to "
            f"{listed}: lower adapter_memory, merge_memory, kv_memory or token_budget, raise "
            "gpu_memory, or stop other processes on the device",
        )
    return wanted or fitting


@dataclass(frozen=True, slots=True)
class CacheSizer:
    """Number of KV blocks of a decoder, of requests and of virtual tokens together.

    Attributes:
        elsewhere: bytes of the device that were in use before this process used any.
        measure: free and total bytes of the device; None on a CPU.
    """

    config: RunnerConfig
    bytes_of_token: int
    elsewhere: int = 0
    measure: Callable[[], tuple[int, int]] | None = None

    @staticmethod
    def on(device: torch.device, config: RunnerConfig, bytes_of_token: int = 1) -> CacheSizer:
        """Measures a device that this process has not used yet."""
        if device.type != "cuda":
            return CacheSizer(config, bytes_of_token)
        free, total = torch.cuda.mem_get_info(device)
        return CacheSizer(
            config, bytes_of_token, total - free, lambda: torch.cuda.mem_get_info(device)
        )

    def prefix_blocks(self, block_size: int) -> int:
        """Blocks that are set aside for virtual tokens."""
        return -(-self.config.virtual_tokens // block_size)

    def room_for_copies(self) -> int:
        """Bytes for copies of the base's matrices: a part of what `gpu_memory` leaves.

        To be called once the base and the memory for adapters are on the device. Leaves room for
        the base once more, since its matrices are brought into the layout of the kernels.
        """
        if self.measure is None:
            return 0
        free, total = self.measure()
        config = self.config
        used = total - free
        base = used - self.elsewhere - config.adapter_memory
        cache = config.kv_tokens * self.bytes_of_token or config.kv_memory
        limit = int(total * config.gpu_memory)
        return max(0, limit - used - base - cache - config.merge_memory) // _COPIES

    def __call__(self, block_size: int, later: Mapping[str, int]) -> int:
        """See `decoder.open.CacheSize`. Raises `Refusal`."""
        prefix = self.prefix_blocks(block_size)
        if self.measure is None:
            return given_blocks(self.config, block_size, self.bytes_of_token) + prefix
        free, total = self.measure()
        taken = {
            "base model, adapters and workspace": total - free - self.elsewhere,
            "merged copies": self.config.merge_memory,
            **later,
        }
        memory = DeviceMemory(total, self.elsewhere, taken)
        own = blocks_left(self.config, memory, block_size, self.bytes_of_token, prefix)
        return own + prefix


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"
