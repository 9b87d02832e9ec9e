"""Choosing the next tokens on the device, from logits and the parameters of each draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_model.decoder.cuda.kernels.common import Compilation


@dataclass(frozen=True, slots=True)
class DeviceDraws:
    """A `DrawTable` in device memory.

    Attributes:
        records: int32 [capacity, RECORD]; rows from `count` on are not read.
        lists: int32 [N]; not read if no draw has penalties, so it may be empty.
        count: int32 [1], number of draws.
    """

    records: torch.Tensor
    lists: torch.Tensor
    count: torch.Tensor


def workspace(capacity: int, device: torch.device) -> torch.Tensor:
    """Memory that `sample` needs for up to `capacity` draws: int32 [capacity, 4096]."""
    return torch.empty((capacity, 4096), dtype=torch.int32, device=device)


def sample(
    logits: torch.Tensor, draws: DeviceDraws, last_tokens: torch.Tensor, kept: torch.Tensor
) -> None:
    """Chooses a token for each draw and writes it over `last_tokens`. Changes the logits.

    Args:
        logits: float32 [R, vocab], contiguous. Rows that a draw chooses from are overwritten, so
            lines that the host wants are copied before (`copy_lines`).
        draws: the draws; the grid covers their capacity, `draws.count` is read by the kernels.
        last_tokens: int32 [capacity or more]. Before: the tokens of the draws of the launch before,
            which `pending` refers to. After: the tokens of these draws; -1 if the row's logits are
            not all finite. Elements from the count on stay as they are.
        kept: from `workspace`.
    """
    raise NotImplementedError


def copy_lines(
    logits: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, lines: torch.Tensor
) -> None:
    """Copies row `rows[i]` of the logits, float32 [R, vocab], to row i of `lines` [capacity, vocab].

    `rows` is int32 [capacity]; `count`, int32 [1], says how many of them are copied.
    """
    raise NotImplementedError


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    return []
