"""Tables of what a position means for attention, on the device: one row for each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_model.base.config import NO_ROPE, DecoderConfig
from loraplex_model.decoder.forward import Places


@dataclass(frozen=True, slots=True)
class PositionTables:
    """What `forward.Places` computes, for all positions.

    A model with LongRoPE has a row for each position of a short sequence, and behind these one for
    each position of a long sequence. So which of the two a row of a pass is in is its row of the
    tables, a number in device memory, and one captured graph computes both.

    Attributes:
        ropes: cosines and sines, float32 [rows, width / 2], by index in `DecoderConfig.ropes`.
        query_scales: float32 [rows], factors on queries in the compute dtype; None for 1.
        long_from: the row of position 0 of long sequences; 0 if they use the rows of short ones.
    """

    ropes: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    query_scales: torch.Tensor | None
    long_from: int

    @staticmethod
    def of(
        config: DecoderConfig, positions: int, dtype: torch.dtype, device: torch.device
    ) -> PositionTables:
        """The tables for positions 0 to `positions - 1` and activations of `dtype`."""
        at = torch.arange(positions)
        parts = [Places.of(config, at, None, torch.float32)]
        if config.long_rope is not None:
            is_long = torch.ones(positions, dtype=torch.bool)
            parts.append(Places.of(config, at, is_long, torch.float32))
        ropes = []
        for index in range(len(config.ropes)):
            cos, sin = zip(*(part.ropes[index] for part in parts), strict=True)
            ropes.append((torch.cat(cos).flatten(1), torch.cat(sin).flatten(1)))
        scales = [part.query_scale for part in parts if part.query_scale is not None]
        return PositionTables(
            tuple((cos.to(device), sin.to(device)) for cos, sin in ropes),
            torch.cat(scales).flatten().to(dtype).float().to(device) if scales else None,
            positions if len(parts) > 1 else 0,
        )

    def of_layer(
        self, config: DecoderConfig, layer: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Cosines and sines of a layer; None if it rotates nothing."""
        index = config.layer_rope(layer)
        return (None, None) if index == NO_ROPE else self.ropes[index]
