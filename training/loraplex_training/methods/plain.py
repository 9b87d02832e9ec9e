"""Adapters that consist of parameters alone, and what the files of all methods have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from loraplex_adapters.format.modules import PREFIX
from loraplex_adapters.load.deltas import parts_of
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta, SiteDelta
from loraplex_model.base.config import Site
from loraplex_model.base.weights import BaseWeights

from loraplex_training.methods.base import AdapterFiles, ParameterGroup, Setting, TrainedAdapter
from loraplex_training.methods.targets import module_path

Tensors = Mapping[str, torch.Tensor]


class PlainAdapter(TrainedAdapter):
    """A `TrainedAdapter` that consists of its parameters alone."""

    def __init__(
        self,
        parameters: Tensors,
        delta: Callable[[], AdapterDelta],
        config: Mapping[str, object],
        tensors: Callable[[], Tensors] | None = None,
        undecayed: Collection[str] = (),
    ) -> None:
        """`delta` and `tensors` (of the file) are computed from the parameters at each call.

        Without `tensors` the file has the parameters themselves.

        `undecayed` names the parameters without weight decay: gains, whose initial value is not 0,
        and biases, by convention.
        """
        self.parameters = parameters
        self._delta, self._config = delta, config
        self._tensors = tensors or (lambda: parameters)
        self._undecayed = undecayed

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`."""
        return self._delta()

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`."""
        decayed = tuple(name for name in self.parameters if name not in self._undecayed)
        spared = tuple(name for name in self.parameters if name in self._undecayed)
        groups = (ParameterGroup(decayed), ParameterGroup(spared, decay=False))
        return [group for group in groups if group.names]

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`."""
        with torch.no_grad():
            tensors = {name: stored(tensor) for name, tensor in self._tensors().items()}
        return AdapterFiles(self._config, tensors)


def config_of(setting: Setting, peft_type: str, **options: object) -> dict[str, object]:
    """Returns an adapter's configuration: the keys of all kinds, and `options`."""
    return {
        "base_model_name_or_path": setting.base_model,
        "inference_mode": True,
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        **options,
    }


def tensor_name(base: BaseWeights, site: Site, ending: str) -> str:
    """Returns the name of a module's tensor in the file."""
    return f"{PREFIX}{module_path(base, site)}.{ending}"


def divided(changes: Mapping[Site, SiteDelta], base: BaseWeights) -> AdapterDelta:
    """The adapter with these changes; those of joined matrices by the projections in them."""
    sites: dict[Site, SiteDelta] = {}
    for site, change in changes.items():
        if isinstance(change, ProjectionDelta):
            sites |= parts_of(site, change, base.config)
        else:
            sites[site] = change
    return AdapterDelta(sites)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy for the file: float32, on the CPU, contiguous."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def leaf(start: torch.Tensor, base: BaseWeights) -> torch.Tensor:
    """Returns a parameter with these initial values, in training's precision and on its device."""
    return start.detach().to(base.embed.device, precision(base), copy=True).requires_grad_()


def precision(base: BaseWeights) -> torch.dtype:
    """Returns the dtype of parameters: float32, or float64 on a float64 base."""
    return torch.float64 if base.embed.dtype == torch.float64 else torch.float32
