"""One adapter as one flat tensor, without padding to a common rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch

from loraplex_model.adapters.delta import (
    AdapterDelta,
    BottleneckDelta,
    SiteDelta,
    VirtualTokens,
    delta_type,
    tensor_fields,
)
from loraplex_model.base.config import Site
from loraplex_model.base.dtypes import ALIGNMENT
from loraplex_model.ops import mapping


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a tensor in the packed bytes."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter as one flat tensor.

    Attributes:
        data: uint8, on the host (pinned if a device copies from it) or on the device.
        places: where each tensor of a site's change lies, by the attribute's name.
        virtual_places: the same for the attributes of `VirtualTokens`.
        options: `activation` and `reads` of the bottlenecks, by site.
    """

    data: torch.Tensor
    places: Mapping[Site, Mapping[str, Place]]
    virtual_places: Mapping[str, Place]
    options: Mapping[Site, Mapping[str, Any]]

    @property
    def nbytes(self) -> int:
        """Size in bytes, in host memory and on the device alike."""
        return self.data.numel()

    @property
    def virtual_tokens(self) -> int:
        """Number of positions before every prompt."""
        virtual = self.virtual
        return 0 if virtual is None else virtual.count

    @property
    def virtual(self) -> VirtualTokens | None:
        """The virtual tokens as views of `data`; None if there are none."""
        if not self.virtual_places:
            return None
        return VirtualTokens(**{name: self._at(p) for name, p in self.virtual_places.items()})

    def unpack(self) -> AdapterDelta:
        """The adapter's changes, as views of `data`."""
        sites: dict[Site, SiteDelta] = {}
        for site, places in self.places.items():
            parts: dict[str, Any] = {name: self._at(place) for name, place in places.items()}
            sites[site] = delta_type(site[1])(**parts, **self.options.get(site, {}))
        return AdapterDelta(sites, self.virtual)

    def to(self, device: torch.device) -> PackedAdapter:
        """The adapter on `device`; itself if it is there already."""
        if self.data.device == device:
            return self
        data = self.data.to(device, non_blocking=True)
        return PackedAdapter(data, self.places, self.virtual_places, self.options)

    def _at(self, place: Place) -> torch.Tensor:
        size = prod(place.shape) * place.dtype.itemsize
        return self.data[place.start : place.start + size].view(place.dtype).view(place.shape)


@torch.no_grad()
def pack(
    delta: AdapterDelta, dtype: torch.dtype, zeros: Callable[[int], torch.Tensor] = mapping.zeros
) -> PackedAdapter:
    """Copies an adapter's tensors, back to back, to host memory.

    Matrices are converted to `dtype`, vectors to float32, token ids to int32; the tensors may be
    on any device and in training. A tensor that several sites have is packed once. `zeros`
    allocates the host memory, uint8, of a number of bytes. Shapes must be right.
    """
    end = 0
    pieces: list[tuple[Place, torch.Tensor]] = []
    held: dict[tuple[int, torch.dtype], Place] = {}

    def put(tensor: torch.Tensor, kind: torch.dtype) -> Place:
        nonlocal end
        place = held.get((id(tensor), kind))
        if place is not None:
            return place
        place = held[id(tensor), kind] = Place(end, tuple(tensor.shape), kind)
        pieces.append((place, tensor))
        end += -(-tensor.numel() * kind.itemsize // ALIGNMENT) * ALIGNMENT
        return place

    places: dict[Site, dict[str, Place]] = {}
    options: dict[Site, dict[str, Any]] = {}
    for site, change in delta.sites.items():
        found = {}
        for name, _, is_matrix in tensor_fields(delta_type(site[1])):
            tensor = getattr(change, name)
            if tensor is not None and tensor.numel():
                vector = torch.float32 if tensor.is_floating_point() else torch.int32
                found[name] = put(tensor, dtype if is_matrix else vector)
        if found:
            places[site] = found
        if isinstance(change, BottleneckDelta):
            options[site] = {"activation": change.activation, "reads": change.reads}
    virtual = {}
    for attribute in fields(VirtualTokens) if delta.virtual is not None else ():
        tensor = getattr(delta.virtual, attribute.name)
        if tensor is not None:
            virtual[attribute.name] = put(tensor, dtype)
    packed = PackedAdapter(zeros(end), places, virtual, options)
    for place, tensor in pieces:
        packed._at(place).copy_(tensor)
    return packed
