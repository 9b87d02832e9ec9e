"""The seam between the engine and the model: a real one, or a test's oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from loraplex_server.engine.messages import AdapterRef, Logprobs, ModelInfo

if TYPE_CHECKING:
    import torch
    from loraplex_model.base.batch import ForwardBatch


class OutOfDeviceMemory(Exception):
    """A pass needed more device memory than is free; nothing else is lost.

    The runner has returned the allocator's unused memory to the device before it raises this. A
    smaller pass may succeed.
    """


class DeviceLost(BaseException):
    """The device or this process's context on it is unusable, so every later call would fail.

    Only a new process can continue. Not an `Exception`, so that no code that handles the failure of
    one request or adapter catches it.
    """


class LoadedAdapter(Protocol):
    """An adapter read, checked and packed in host memory; not (or no longer) on the device."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device, and in host memory."""

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that it puts before every prompt."""

    @property
    def invocation_tokens(self) -> Sequence[int]:
        """Token ids from whose last occurrence in a prompt on it acts; empty: on all tokens."""

    @property
    def merge_nbytes(self) -> int:
        """Bytes that its dense copies would take; 0 if it changes no matrix of the layers."""


class MergedWeights(Protocol):
    """Dense copies of the matrices that an adapter changes, not yet in use."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""


class RowSampler(Protocol):
    """Chooses tokens and computes log-probabilities, for all rows of a step in one call.

    Logits are float32 [lines, vocab]. Row r takes its logits from line `lines[r]`.
    """

    def choose(
        self, logits: NDArray[np.float32], lines: Sequence[int], draws: Sequence[int]
    ) -> list[int]:
        """The next token of each row, the one that `batching.sampler` chooses.

        `draws` are the addresses of the rows' `DrawState`.
        """

    def logprobs(
        self,
        logits: NDArray[np.float32],
        lines: Sequence[int],
        tokens: Sequence[int],
        counts: Sequence[int],
    ) -> list[Logprobs]:
        """For each row, the log-probabilities of its token and of its `counts` best tokens."""

    def finite(self, logits: NDArray[np.float32]) -> list[bool]:
        """For each line, whether all its logits are finite."""


class ModelRunner(Protocol):
    """The model as the engine drives it.

    The runner owns weights, KV tensors and adapter slots; the engine decides which block and which
    slot is used, and when. All methods run on the engine's thread, except `read_adapter` and
    `merge_adapter`, which run on loader threads, concurrently with the others and with each other.

        KV blocks:  0 .. num_blocks - 1           requests
                    num_blocks .. + prefix_blocks adapters' virtual tokens
    """

    info: ModelInfo
    block_size: int
    num_blocks: int
    prefix_blocks: int
    num_slots: int
    adapter_budget_bytes: int
    host_budget_bytes: int
    merge_budget_bytes: int

    def forward(
        self, batch: ForwardBatch, states: NDArray[np.float32] | None = None
    ) -> torch.Tensor:
        """Computes a forward pass; returns logits, float32 [R, vocab], on the CPU.

        The next call may overwrite them. Writes the final states of `batch.state_rows` to `states`,
        float32 [H, hidden]; it is given if the batch wants some.
        """

    def read_adapter(self, ref: AdapterRef) -> LoadedAdapter:
        """Reads and packs an adapter's files. Raises `Refusal`. Changes no slot."""

    def prepare_adapter(self, adapter: LoadedAdapter) -> bool:
        """Begins or continues to copy an adapter to the device; True once it can be published.

        Called between steps, again and again, for an adapter that there is room for. An adapter
        that was prepared is given up if another one is prepared or published instead.
        """

    def publish_adapter(self, slot: int, adapter: LoadedAdapter, blocks: Sequence[int]) -> None:
        """Puts the adapter into `slot`, and its virtual tokens' keys and values into `blocks`.

        Called between steps. The adapter can be published again later.
        """

    def remove_adapter(self, slot: int) -> None:
        """Frees the slot's weights and dense copies. Called between steps, when no row uses it."""

    def merge_adapter(self, adapter: LoadedAdapter) -> MergedWeights:
        """Computes an adapter's dense copies. Runs on a loader thread; changes nothing else."""

    def publish_merge(self, slot: int, merged: MergedWeights) -> None:
        """Lets rows of `slot` use the copies from the next pass on. Called between steps."""

    def remove_merge(self, slot: int) -> None:
        """Drops the copies: rows of `slot` are computed unmerged from the next pass on."""


NOTHING_PENDING = -1
"""`DrawOrder.pending` of a draw whose earlier tokens are all known."""


@dataclass(frozen=True, slots=True)
class DrawOrder:
    """How the device chooses the next token of one row, as `batching.sampler` would.

    Attributes:
        temperature: 0 takes the largest logit after penalties; then the fields up to `uniform` are
            without effect.
        top_k: number of largest logits that remain; 0 keeps all.
        top_p: share of the probability that remains; 1 keeps all.
        min_p: smallest probability that remains, as a fraction of the largest; 0 keeps all.
        uniform: the random number of this draw, float64 in [0, 1).
        repetition_penalty: divides (or multiplies, if negative) the logits of tokens in `seen`; 1
            is without effect.
        presence_penalty: subtracted from the logits of tokens in `counted`.
        frequency_penalty: subtracted once per occurrence, `counts`.
        seen: int32, different tokens of prompt and output; empty without a repetition penalty.
        counted: int32, different tokens of the output; empty without the other two penalties.
        counts: float32, how often each token of `counted` occurred.
        pending: `NOTHING_PENDING`, or k: the token of draw k of the launch before, which the host
            does not know yet, belongs to `seen` and (once more) to `counted` too.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seen: NDArray[np.int32]
    counted: NDArray[np.int32]
    counts: NDArray[np.float32]
    pending: int = NOTHING_PENDING


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a launch brings back to the host.

    Attributes:
        tokens: int32 [D], the token of each draw; -1 if the row's logits are not all finite.
        lines: float32 [L, vocab], the logits that were asked for.
        states: float32 [H, hidden], the final states of `batch.state_rows`.
    """

    tokens: NDArray[np.int32]
    lines: NDArray[np.float32]
    states: NDArray[np.float32]


class StepTicket(Protocol):
    """A launch whose result has not been read yet."""

    def wait(self) -> StepResult:
        """Waits for the launch to end and returns its result. Called exactly once.

        Raises `DeviceLost`, or any other error if this launch alone has failed.
        """


class AheadRunner(ModelRunner, Protocol):
    """A runner that chooses tokens on the device, so that a pass can follow before they are read.

    At most two launches are in flight. They run in the order of their calls, on one stream, and so
    does the device's part of every other method: a launch sees the KV entries and the tokens of the
    launches before, and an adapter is published behind the launches that are under way. Their
    tickets are waited for in the same order. Calls of other methods between two launches, `forward`
    included, leave the tokens of the earlier one available to the later one.

    The engine calls `remove_adapter`, `publish_merge` and `remove_merge` for a slot only after
    every ticket whose launch used the slot has been waited for. KV blocks of an ended request can
    be used by the next launch at once.
    """

    def launch(
        self,
        batch: ForwardBatch,
        draws: Sequence[DrawOrder],
        draw_lines: NDArray[np.int32],
        host_lines: NDArray[np.int32],
    ) -> StepTicket:
        """Starts a forward pass and the choice of tokens; does not wait for either.

        A token id of -1 - k in `batch.tokens` stands for the token of draw k of the launch before.
        That token may be -1 (its logits were not finite): then the engine drops the row's result,
        and the pass may compute anything for that row, but must not fail.

        Args:
            batch: the pass. The runner has copied what it needs of it when this returns.
            draws: D orders; draw d chooses from the logits of `logit_rows[draw_lines[d]]`.
            draw_lines: int32 [D], indices into `batch.logit_rows`.
            host_lines: int32 [L], indices into `batch.logit_rows` whose logits the host wants.

        Raises:
            OutOfDeviceMemory: too little memory is free; nothing was started, and a smaller pass
                may be launched instead. The tokens of the launch before remain available to it.
            DeviceLost: the device cannot be used any more.
        """


def sampler_of(runner: ModelRunner) -> RowSampler | None:
    """The sampler of a runner. A runner without kernels has no `sampler`, or None in its place."""
    sampler: RowSampler | None = getattr(runner, "sampler", None)
    return sampler


def works_ahead(runner: ModelRunner) -> TypeGuard[AheadRunner]:
    """Whether a runner can launch a pass before the one before it has been read.

    A runner that cannot has no `launch`, or None in its place.
    """
    return getattr(runner, "launch", None) is not None
