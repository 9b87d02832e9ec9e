"""Bottleneck adapters written by their documented format, and hooks that compute them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loraplex_model.base.info import BaseInfo
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as f

BOTH = ["attention", "mlp"]

# name: non-linearity, what it reads, where it stands, scaling, width (None: varies), with biases
ADAPTERS: dict[str, tuple[str, str, list[str], float, int | None, bool]] = {
    "bottleneck relu": ("relu", "normed", BOTH, 1.0, 16, False),
    "bottleneck silu": ("silu", "output", BOTH, 0.5, 12, True),
    "bottleneck gelu": ("gelu", "stream", BOTH, 1.0, None, True),
    "bottleneck gelu_tanh": ("gelu_tanh", "normed", ["mlp"], 2.0, 8, True),
    "bottleneck tanh": ("tanh", "stream", ["attention"], 1.0, 7, False),
    "bottleneck sigmoid": ("sigmoid", "output", ["mlp"], 1.0, 1, True),
    "bottleneck leaky_relu": ("leaky_relu", "normed", ["attention"], -1.5, 33, True),
    "bottleneck linear": ("linear", "incoming", BOTH, 1.0, 5, False),
}

_NON_LINEAR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "silu": f.silu,
    "gelu": f.gelu,
    "gelu_tanh": partial(f.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": partial(f.leaky_relu, negative_slope=0.01),
    "linear": lambda x: x,
}
_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


def write(name: str, base: BaseInfo, directory: Path) -> Path:
    """Writes a random adapter for a base of these shapes."""
    non_linearity, reads, placements, scaling, width, biased = ADAPTERS[name]
    random = torch.Generator().manual_seed(sum(name.encode()))
    hidden = base.config.hidden_size
    tensors = {}
    for layer in range(base.config.num_layers):
        for i, placement in enumerate(placements):
            prefix = f"base_model.model.model.layers.{layer}.{_BLOCKS[placement]}.bottleneck_"
            inner = width or 3 + 7 * layer + i
            shapes = {"down.weight": (inner, hidden), "up.weight": (hidden, inner)}
            if biased:
                shapes |= {"down.bias": (inner,), "up.bias": (hidden,)}
            for ending, shape in shapes.items():
                tensors[prefix + ending] = 0.15 * torch.randn(shape, generator=random)
    config = {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "bottleneck_size": width,
        "non_linearity": non_linearity,
        "placements": placements,
        "reads": reads,
        "scaling": scaling,
    }
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def attach(model: Any, directory: Path) -> None:
    """Hooks the adapter into transformers' model, after each of its blocks."""
    config = json.loads((directory / "adapter_config.json").read_text())
    attach_tensors(model, config, load_file(directory / "adapter_model.safetensors"))


def attach_tensors(
    model: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Hooks tensors in memory into the model; they receive gradients if `requires_grad` is set."""
    for layer, module in enumerate(model.model.layers):
        for placement in config["placements"]:
            prefix = f"base_model.model.model.layers.{layer}.{_BLOCKS[placement]}.bottleneck_"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if own:
                _attach(module, placement, config, own)


def _attach(
    layer: nn.Module, placement: str, config: Mapping[str, Any], own: dict[str, torch.Tensor]
) -> None:
    seen = {}

    def norm(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["residual"], seen["normed"] = inputs[0], output

    def block(_: nn.Module, inputs: Any, output: Any) -> Any:
        added = output[0] if isinstance(output, tuple) else output
        read = {
            "normed": seen["normed"],
            "output": added,
            "stream": seen["residual"] + added,
            "incoming": seen["residual"],
        }[config["reads"]]
        inner = f.linear(read, own["down.weight"], own.get("down.bias"))
        inner = _NON_LINEAR[config["non_linearity"]](inner)
        added = added + config["scaling"] * f.linear(inner, own["up.weight"], own.get("up.bias"))
        return (added, *output[1:]) if isinstance(output, tuple) else added

    layer.get_submodule(_NORMS[placement]).register_forward_hook(norm)
    layer.get_submodule(_BLOCKS[placement]).register_forward_hook(block)
