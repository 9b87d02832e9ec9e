"""Methods that are parameters and nothing else: no masks, budgets, penalties or dropout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.weights import BaseWeights

from loraplex_training.methods.base import AdapterFiles, Observe, ParameterGroup, Setting

Tensors = Mapping[str, torch.Tensor]


class PlainAdapter:
    """A `TrainedAdapter` whose parameters alone say what it is."""

    dropout = 0.0
    settled = 0

    def __init__(
        self,
        parameters: Tensors,
        delta: Callable[[], AdapterDelta],
        config: Mapping[str, object],
        tensors: Callable[[], Tensors],
        undecayed: Collection[str] = (),
    ) -> None:
        """`delta` and `tensors` (those of the file) are made anew from the parameters each time.

        `undecayed` are the names of parameters that weight decay would pull away from what they
        were at the start, or that are conventionally spared it: gains and biases.
        """
        self.parameters = parameters
        self.delta = delta
        self._config, self._tensors = config, tensors
        self._undecayed = undecayed

    def prepare(self, observe: Observe) -> None:
        """Nothing is chosen from data."""

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`."""
        decayed = tuple(name for name in self.parameters if name not in self._undecayed)
        spared = tuple(name for name in self.parameters if name in self._undecayed)
        groups = (ParameterGroup(decayed), ParameterGroup(spared, decay=False))
        return [group for group in groups if group.names]

    def penalty(self) -> None:
        """There is none."""

    def stepped(self, step: int) -> None:
        """Nothing follows a step."""

    def state(self) -> Tensors:
        """Everything is in the parameters."""
        return {}

    def restore(self, state: Tensors) -> None:
        """See `state`."""

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`."""
        with torch.no_grad():
            tensors = {
                name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                for name, tensor in self._tensors().items()
            }
        return AdapterFiles(self._config, tensors)


def config_of(setting: Setting, peft_type: str, **options: object) -> dict[str, object]:
    """An adapter's configuration: what every kind has, and a kind's own."""
    return {
        "base_model_name_or_path": setting.base_model,
        "inference_mode": True,
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        **options,
    }


def leaf(start: torch.Tensor, base: BaseWeights) -> torch.Tensor:
    """A parameter with these initial values, in the precision and on the device of training."""
    return start.detach().to(base.embed.device, precision(base), copy=True).requires_grad_()


def precision(base: BaseWeights) -> torch.dtype:
    """The type of parameters: float32, or float64 on a base of float64."""
    return torch.float64 if base.embed.dtype == torch.float64 else torch.float32
