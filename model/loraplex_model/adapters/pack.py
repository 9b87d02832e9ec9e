"""One adapter as one flat tensor, each part exactly as large as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from loraplex_model.adapters.delta import (
    STORED,
    TENSORS,
    Activation,
    AdapterDelta,
    Reads,
    SiteDelta,
    VirtualTokens,
)
from loraplex_model.base.config import Site
from loraplex_model.base.dtypes import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the packed bytes."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter as one flat tensor, every part exactly as large as it is.

    Attributes:
        data: uint8, on the host (pinned, where a device copies from it) or on the device.
        places: by site and attribute of `SiteDelta`; virtual tokens under ("virtual", attribute).
        options: activation and input of the bottlenecks.
    """

    data: torch.Tensor
    places: Mapping[Site, Mapping[str, Place]]
    virtual_places: Mapping[str, Place]
    options: Mapping[Site, tuple[Activation, Reads]]

    @property
    def nbytes(self) -> int:
        """Bytes in host memory, and on the device."""
        return self.data.numel()

    @property
    def virtual_tokens(self) -> int:
        """Positions that it puts before every prompt."""
        virtual = self.virtual
        return 0 if virtual is None else virtual.count

    @property
    def virtual(self) -> VirtualTokens | None:
        """Its virtual tokens as views of `data`, if it has any."""
        if not self.virtual_places:
            return None
        return VirtualTokens(**{name: self._at(p) for name, p in self.virtual_places.items()})

    def unpack(self) -> AdapterDelta:
        """What it changes, as views of `data`."""
        return AdapterDelta(
            {
                site: SiteDelta(
                    **{name: self._at(place) for name, place in places.items()},
                    activation=self.options[site][0],
                    reads=self.options[site][1],
                )
                for site, places in self.places.items()
            },
            self.virtual,
        )

    def to(self, device: torch.device) -> PackedAdapter:
        """The same on another device; itself if it is there."""
        if self.data.device == device:
            return self
        data = self.data.to(device, non_blocking=True)
        return PackedAdapter(data, self.places, self.virtual_places, self.options)

    def _at(self, place: Place) -> torch.Tensor:
        strides = [1]
        for length in reversed(place.shape[1:]):
            strides.append(strides[-1] * length)
        whole = self.data.view(place.dtype)  # its end is aligned, as all that is in it
        return whole.as_strided(place.shape, strides[::-1], place.start // place.dtype.itemsize)


def pack(delta: AdapterDelta, dtype: torch.dtype, *, pin: bool = False) -> PackedAdapter:
    """Lays an adapter's tensors back to back in host memory, matrices in `dtype`.

    `pin` takes memory that a CUDA device can copy from while it computes. Shapes must be right.
    """
    end = 0
    pieces: list[tuple[Place, torch.Tensor]] = []

    def put(tensor: torch.Tensor, kind: torch.dtype) -> Place:
        nonlocal end
        place = Place(end, tuple(tensor.shape), kind)
        pieces.append((place, tensor))
        end += -(-tensor.numel() * kind.itemsize // ALIGNMENT) * ALIGNMENT
        return place

    places: dict[Site, dict[str, Place]] = {}
    options: dict[Site, tuple[Activation, Reads]] = {}
    for site, change in delta.sites.items():
        found = {}
        for name in TENSORS:
            tensor = getattr(change, name)
            if tensor is not None and tensor.numel():
                kind = dtype if name in STORED else tensor.dtype
                assert name in STORED or kind in (torch.float32, torch.int32), name
                found[name] = put(tensor, kind)
        if found:
            places[site] = found
            options[site] = (change.activation, change.reads)
    virtual = {}
    for attribute in fields(VirtualTokens) if delta.virtual is not None else ():
        tensor = getattr(delta.virtual, attribute.name)
        if tensor is not None:
            virtual[attribute.name] = put(tensor, dtype)
    data = torch.zeros(end, dtype=torch.uint8, pin_memory=pin)
    packed = PackedAdapter(data, places, virtual, options)
    for place, tensor in pieces:
        packed._at(place).copy_(tensor)
    return packed
