"""The oracle as a device: launches are computed as late as the engine allows.

A launch is stored, and computed by the oracle only when its ticket is waited for. Whatever the
engine does in between, too early, shows: a slot of which the launch reads the weights is removed or
gets others, tickets are read in another order, a token that is not known yet is used by the wrong
launch. The tokens are chosen from the `DrawOrder`s alone, by the plain formulas.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from engine.oracle import OracleAdapter, OracleMerge, OracleRunner
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.batching.sampler import candidates, finite_rows, invert
from loraplex_server.engine.runner.protocol import (
    DeviceLost,
    DrawOrder,
    OutOfDeviceMemory,
    StepResult,
)

UNKNOWN = -1
"""Token of a draw that failed."""


def choose(order: DrawOrder, logits: np.ndarray, pending: int | None) -> int:
    """The token that `order` draws from finite logits [vocab]; `pending` is its pending token."""
    logits = logits.copy()
    seen, counts = order.seen.tolist(), dict(zip(order.counted.tolist(), order.counts, strict=True))
    if pending is not None:
        seen.append(pending)
        counts[pending] = counts.get(pending, np.float32(0)) + np.float32(1)
    if order.repetition_penalty != 1.0:
        ids = np.array(sorted(set(seen)), np.int64)
        penalty = np.float32(order.repetition_penalty)
        logits[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    if order.frequency_penalty or order.presence_penalty:
        for token, count in counts.items():
            logits[token] -= np.float32(order.frequency_penalty) * np.float32(count)
            logits[token] -= np.float32(order.presence_penalty)
    if order.temperature == 0.0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / np.float32(order.temperature)
    kept, weights = candidates(scaled, order.top_k, order.top_p, order.min_p)
    at = invert(weights, order.uniform)
    return at if kept is None else int(kept[at])


class AheadTicket:
    """A launch that is computed when it is waited for."""

    def __init__(
        self,
        device: AheadOracle,
        batch: ForwardBatch,
        draws: Sequence[DrawOrder],
        lines: tuple[np.ndarray, np.ndarray],
        before: np.ndarray,
    ) -> None:
        """`before` gets the tokens of the launch before as soon as that is computed."""
        self._device = device
        self._batch = batch
        self._draws = list(draws)
        self._lines = lines
        self._before = before
        self.tokens = np.full(len(draws), UNKNOWN, np.int32)
        self.uses = {int(slot): device.contents(int(slot)) for slot in batch.mix_slots}

    def wait(self) -> StepResult:
        self._device.begin_read(self)
        for slot, contents in self.uses.items():
            assert self._device.contents(slot) == contents, "a launch reads other weights"
        batch = dataclasses.replace(self._batch, tokens=self._resolved())
        states = np.empty((len(batch.state_rows), self._device.inner.width), np.float32)
        logits = self._device.inner.forward(*((batch, states) if len(states) else (batch,)))
        draw_lines, host_lines = self._lines
        finite = finite_rows(logits)
        for draw, (order, line) in enumerate(zip(self._draws, draw_lines, strict=True)):
            pending = None if order.pending < 0 else int(self._before[order.pending])
            if finite[line] and pending != UNKNOWN:
                self.tokens[draw] = choose(order, logits[line], pending)
        return StepResult(self.tokens.copy(), logits[host_lines], states)

    def _resolved(self) -> np.ndarray:
        tokens = self._batch.tokens.copy()
        unknown = tokens < 0
        tokens[unknown] = np.maximum(self._before[-1 - tokens[unknown]], 0)
        return tokens


class AheadOracle:
    """An `AheadRunner` over an oracle, which is reached through it in all other respects.

    Attributes:
        launches: number of launches.
        most_in_flight: largest number of launches that were not read.
        log: "launch n" and "read n", in order; n counts from 1.
        failing_launches: number of next launches that fail.
    """

    def __init__(self, inner: OracleRunner) -> None:
        self.inner = inner
        self.launches = 0
        self.most_in_flight = 0
        self.log: list[str] = []
        self.failing_launches = 0
        self._open: deque[AheadTicket] = deque()
        self._tokens = np.empty(0, np.int32)
        self._read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def launch(
        self,
        batch: ForwardBatch,
        draws: Sequence[DrawOrder],
        draw_lines: np.ndarray,
        host_lines: np.ndarray,
    ) -> AheadTicket:
        if self.inner.out_of_memory:
            self.inner.out_of_memory -= 1
            raise OutOfDeviceMemory("a secret of the allocator")
        if self.failing_launches:
            self.failing_launches -= 1
            raise RuntimeError("a secret of the device")
        if self.inner.lost_token in batch.tokens and self.inner.lost_at == "launch":
            raise DeviceLost("a secret of the device")
        assert len(self._open) < 2, "three launches in flight"
        assert len(draws) == len(draw_lines)
        assert all(order.pending < len(self._tokens) for order in draws)
        assert batch.tokens.min() >= -len(self._tokens), "a token of no draw"
        ticket = AheadTicket(self, batch, draws, (draw_lines, host_lines), self._tokens)
        self._tokens = ticket.tokens
        self._open.append(ticket)
        self.launches += 1
        self.log.append(f"launch {self.launches}")
        self.most_in_flight = max(self.most_in_flight, len(self._open))
        return ticket

    def begin_read(self, ticket: AheadTicket) -> None:
        """Notes that a ticket is waited for."""
        assert self._open, "a ticket is read twice"
        assert self._open.popleft() is ticket, "tickets are read in another order"
        self._read += 1
        self.log.append(f"read {self._read}")

    def contents(self, slot: int) -> tuple[OracleAdapter | None, OracleMerge | None]:
        """What a slot holds."""
        return self.inner.slots[slot], self.inner.merges.get(slot)

    # slots change only when no launch reads them

    def publish_adapter(self, slot: int, adapter: OracleAdapter, blocks: Sequence[int]) -> None:
        self._need_unread(slot)
        self.inner.publish_adapter(slot, adapter, blocks)

    def remove_adapter(self, slot: int) -> None:
        self._need_unread(slot)
        self.inner.remove_adapter(slot)

    def publish_merge(self, slot: int, merged: OracleMerge) -> None:
        self._need_unread(slot)
        self.inner.publish_merge(slot, merged)

    def remove_merge(self, slot: int) -> None:
        self._need_unread(slot)
        self.inner.remove_merge(slot)

    def _need_unread(self, slot: int) -> None:
        assert not any(slot in ticket.uses for ticket in self._open), "a launch reads this slot"
