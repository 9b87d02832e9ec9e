"""The runner of a real model on this machine: weights, KV tensors and adapters."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import VirtualTokens
from loraplex_model.adapters.merge import merged_nbytes
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.adapters.table import Merged
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.checkpoints.mapped import MappedFile
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.open import Decoder, ServingSizes, open_decoder
from loraplex_model.ops.devices import resolve
from loraplex_model.ops.dtypes import BY_NAME
from numpy.typing import NDArray

from loraplex_server.engine.messages import AdapterRef, ModelInfo, files_digest
from loraplex_server.engine.runner.adapter_memory import (
    AdapterMemory,
    SharedMemory,
    adapter_memory,
)
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.device_errors import DeviceErrors
from loraplex_server.engine.runner.launching import Launcher, LaunchingDecoder
from loraplex_server.engine.runner.sampling import NativeSampler
from loraplex_server.engine.runner.sizing import CacheSizer, token_bytes

log = logging.getLogger(__name__)

NUM_SLOTS = 1024

KEPT_LINES = 64
"""Lines of logits whose memory is kept for the next pass on the CPU.

The system would take back and clear so much memory after every pass.
"""

EXIT_BASE_CHANGED = 6
"""Exit status of an engine whose base model was changed on the disk while it was mapped."""


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """A `LoadedAdapter`: packed weights in host memory, ready to be published."""

    packed: PackedAdapter
    merge_nbytes: int
    invocation_tokens: tuple[int, ...] = ()

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that it puts before every prompt."""
        return self.packed.virtual_tokens

    @property
    def nbytes(self) -> int:
        """Bytes in host memory, and on the device."""
        return self.packed.nbytes


@dataclass(kw_only=True)
class LocalRunner:
    """A `ModelRunner` over one decoder. See the protocol for the threads that may call it.

    The decoder has `num_blocks` KV blocks for requests, then `prefix_blocks` for virtual tokens.

    On the CPU the base's packed codes, and dense tensors that need no conversion, stay mapped to
    `base_file`. The file is checked before and after every use, since reading pages that were cut
    off ends the process with SIGBUS, and the rest of the last page would be zeros. If the file has
    changed, the process ends with `EXIT_BASE_CHANGED` and without a result, and the next process
    builds the file again.

    Attributes:
        launch: the method of an `AheadRunner`; None if the decoder computes passes one by one.
        sampler: the kernels' sampler; None if the decoder has no kernels.
    """

    decoder: Decoder
    base_file: MappedFile
    info: ModelInfo
    limits: AdapterLimits
    merge_dtype: torch.dtype
    num_blocks: int
    prefix_blocks: int
    block_size: int
    adapter_budget_bytes: int
    host_budget_bytes: int
    merge_budget_bytes: int
    memory: AdapterMemory = field(default_factory=SharedMemory)
    num_slots: int = NUM_SLOTS

    def __post_init__(self) -> None:
        self._device = self.decoder.weights.embed.device
        self._errors = DeviceErrors(self._device)
        self._lines = torch.empty(0, self.info.base.config.vocab_size)
        self.launch: Launcher | None = None
        if isinstance(self.decoder, LaunchingDecoder):
            self.launch = Launcher(self.decoder, self._errors, self._mapped)
        self.sampler: NativeSampler | None = None
        if isinstance(self.decoder, NativeDecoder):
            self.sampler = NativeSampler(self.decoder.sampling())
        self._need_file()  # most of it was read to pack it for the kernels

    def forward(
        self, batch: ForwardBatch, states: NDArray[np.float32] | None = None
    ) -> torch.Tensor:
        """Logits, float32 [R, vocab], on the CPU; the next call may overwrite them.

        Writes the final states of `batch.state_rows` to `states`, float32 [H, hidden].
        """
        wanted = None if states is None else torch.from_numpy(states)
        with self._mapped(), torch.inference_mode():
            return self._errors.replace(lambda: self._forward(batch, wanted))

    def _forward(self, batch: ForwardBatch, states: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(self.decoder, NativeDecoder):
            return self.decoder.forward(batch, states=states).to("cpu", torch.float32)
        lines = len(batch.logit_rows)
        if lines > KEPT_LINES:
            return self.decoder.forward(batch, states=states)
        if lines > len(self._lines):
            self._lines = torch.empty(lines, self.info.base.config.vocab_size)
        return self.decoder.forward(batch, self._lines[:lines], states=states)

    def read_adapter(self, ref: AdapterRef) -> ReadAdapter:
        """Reads, verifies and packs an adapter's files. Raises `Refusal`."""
        with self._mapped(), self.memory.aside(), torch.inference_mode():
            return self._errors.replace(lambda: self._read(ref))

    def _read(self, ref: AdapterRef) -> ReadAdapter:
        weights = self.decoder.weights
        spec, delta = load(Path(ref.path), files_digest(ref.digest), weights, self.limits)
        packed = pack(delta, weights.embed.dtype, self.memory.zeros)
        merge_nbytes = merged_nbytes(delta, weights.config, self.merge_dtype)
        return ReadAdapter(packed, merge_nbytes, spec.invocation_tokens)

    def prepare_adapter(self, adapter: ReadAdapter) -> bool:
        """Begins or continues to copy an adapter to the device; True once it can be published."""
        return self._errors.replace(lambda: self.memory.prepare(adapter.packed))

    def publish_adapter(self, slot: int, adapter: ReadAdapter, blocks: Sequence[int]) -> None:
        """Points the slot to the adapter; computes its virtual tokens, once, into `blocks`.

        If this raises, the slot is still free.
        """
        table, memory = self.decoder.table, self.memory

        def place() -> None:
            table.publish(slot, memory.take(adapter.packed, partial(table.move, slot)))

        self._errors.replace(place)
        try:
            self._write_virtual_tokens(slot, adapter.packed.virtual, blocks)
        except BaseException:
            self.remove_adapter(slot)
            raise

    def _write_virtual_tokens(
        self, slot: int, virtual: VirtualTokens | None, blocks: Sequence[int]
    ) -> None:
        if virtual is None:
            return
        if virtual.keys is not None and virtual.values is not None:
            keys, values = virtual.keys, virtual.values
            self._errors.replace(lambda: self.decoder.write_prefix(blocks, keys, values))
            return
        first = self.info.base.config.vocab_size
        ids = list(range(first, first + virtual.count))
        self.forward(ForwardBatch.build([(ids, 0, list(blocks), ((slot, 1.0),))]))

    def remove_adapter(self, slot: int) -> None:
        """Frees the slot and the adapter's memory, dense copies included."""
        placed = self.decoder.table.adapters[slot]
        self.decoder.table.remove(slot)
        if placed is not None:
            self.memory.free(placed)

    def merge_adapter(self, adapter: ReadAdapter) -> Merged:
        """Dense copies of the matrices that the adapter changes."""
        with self._mapped(), self.memory.aside(), torch.inference_mode():
            return self._errors.replace(
                lambda: self.decoder.merge(adapter.packed, self.merge_dtype)
            )

    def publish_merge(self, slot: int, merged: Merged) -> None:
        """Lets the rows of the slot use the copies."""
        self.memory.hand_over(merged)
        self.decoder.table.publish_merge(slot, merged)

    def remove_merge(self, slot: int) -> None:
        """Drops the copies."""
        self.decoder.table.remove_merge(slot)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """A context for reading the weights; ends the process if their file has changed."""
        self._need_file()
        yield
        self._need_file()

    def _need_file(self) -> None:
        if self._device.type == "cpu" and not self.base_file.is_intact():
            log.critical(
                "the cached base model was written to or truncated while it was in use; this "
                "process ends, and the next one builds the cache again"
            )
            logging.shutdown()
            os._exit(EXIT_BASE_CHANGED)


def build(config: RunnerConfig) -> LocalRunner:
    """Loads the model and sizes the KV cache. Raises `Refusal` with what the operator can do."""
    device, cache = _device(config.device), Path(config.cache)
    if config.threads:
        torch.set_num_threads(config.threads)
    sizer = CacheSizer.on(device, config)
    base = load_base(config.model, BY_NAME[config.dtype], cache, device=device)
    weights = base.weights
    most = weights.config.max_positions
    positions = min(config.max_context or most, most)
    memory = adapter_memory(device, config.adapter_memory, config.host_adapter_memory, NUM_SLOTS)
    sizer = replace(sizer, bytes_of_token=token_bytes(weights.config, weights.embed.element_size()))
    decoder = open_decoder(
        weights,
        sizer,
        NUM_SLOTS,
        max_positions=positions,
        cache=cache,
        threads=config.threads,
        serving=ServingSizes(
            max_rows=config.token_budget,
            max_draws=config.max_running,
            max_rank=config.max_rank,
            has_graphs=config.cuda_graphs,
            copy_bytes=sizer.room_for_copies(),
        ),
    )
    block_size = decoder.block_size
    prefix_blocks = sizer.prefix_blocks(block_size)
    num_blocks = len(decoder.keys[0]) - prefix_blocks
    context = min(positions, num_blocks * block_size)
    # What torch still does works on a few rows; there its threads would only wait for each other
    # and for those of the decoder.
    if isinstance(decoder, NativeDecoder):
        torch.set_num_threads(1)
    return LocalRunner(
        decoder=decoder,
        base_file=base.file,
        info=_info(base, device, context, decoder),
        limits=AdapterLimits(
            max_rank=config.max_rank,
            max_weights_bytes=config.max_adapter_file,
            max_virtual_tokens=config.max_virtual_tokens,
            max_context=context,
        ),
        merge_dtype=BY_NAME[config.merge_dtype],
        num_blocks=num_blocks,
        prefix_blocks=prefix_blocks,
        block_size=block_size,
        adapter_budget_bytes=config.adapter_memory,
        host_budget_bytes=config.host_adapter_memory,
        merge_budget_bytes=config.merge_memory,
        memory=memory,
    )


def _device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            Reason.NO_CUDA, "there is no CUDA device here (or torch's CPU build is installed); "
            "use --device cpu"
        )  # fmt: skip
    return resolve(device)


def _info(
    base: LoadedBase,
    device: torch.device,
    max_context: int,
    decoder: Decoder,
) -> ModelInfo:
    return ModelInfo(
        base=base.weights.info,
        name=base.name,
        device=str(device),
        kernels=decoder.kernels,
        tokenizer_path=str(base.directory),
        max_context=max_context,
        eos_token_ids=list(base.weights.eos_token_ids),
    )
