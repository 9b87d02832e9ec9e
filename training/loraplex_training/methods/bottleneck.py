"""Bottleneck adapters: small networks parallel to a block or after it, in a format of this project.

stream += scaling * up(f(down(x))), biases included. `up` and its bias start at zero, so an
untrained adapter changes nothing; `down` starts as torch's linear layers do, its bias at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from loraplex_adapters.format.kinds.bottleneck import ACTIVATIONS, PLACEMENTS, READS
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import Activation, AdapterDelta, BottleneckDelta, Reads
from loraplex_model.base.config import Site
from pydantic import BeforeValidator, Field

from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.options import (
    Layers,
    MethodOptions,
    OptionProblems,
    Rank,
    split_names,
)
from loraplex_training.methods.plain import PlainAdapter, config_of, leaf, tensor_name
from loraplex_training.spec.fields import AboveZero, one_of

STYLES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "houlsby": (("attention", "mlp"), "output"),
    "pfeiffer": (("mlp",), "stream"),
    "parallel": (("mlp",), "normed"),
}
"""Placements and inputs of each paper's bottlenecks: Houlsby et al. 2019 (arXiv 1902.00751),
Pfeiffer et al. 2020 (arXiv 2005.00247), He et al. 2021 (arXiv 2110.04366)."""

_PARTS = tuple(
    f"bottleneck_{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")
)


class BottleneckOptions(MethodOptions):
    """Options of bottleneck adapters."""

    style: Annotated[str, one_of(STYLES)] = "pfeiffer"
    """Placement by its paper: houlsby, pfeiffer or parallel."""
    placements: Annotated[
        tuple[Annotated[str, one_of(PLACEMENTS)], ...] | None,
        BeforeValidator(split_names),
        Field(min_length=1),
    ] = None
    """Blocks that get bottlenecks: attention, mlp. Default: the style's."""
    reads: Annotated[str, one_of(READS)] | None = None
    """Input of a bottleneck: normed, output, stream or incoming. Default: the style's."""
    reduction_factor: AboveZero = 16.0
    """Hidden size of the base divided by the width of a bottleneck."""
    bottleneck_size: Rank | None = None
    """Width of a bottleneck, instead of reduction_factor."""
    non_linearity: Annotated[str, one_of(ACTIVATIONS)] = "relu"
    """Activation: linear, relu, silu, gelu, gelu_tanh, tanh, sigmoid or leaky_relu."""
    scaling: Annotated[AboveZero, Field(le=AdapterLimits().max_scale)] = 1.0
    """Factor of a bottleneck's output."""
    leave_out: Layers = ()
    """Layers that get no bottlenecks, as in "0,2,4-7"."""


def bottleneck(
    options: BottleneckOptions, setting: Setting, problems: OptionProblems
) -> TrainedAdapter:
    """Small networks parallel to the attention and MLP blocks or after them.

    Saved as the project's BOTTLENECK kind, which PEFT does not read; see docs/adapters.md.
    """
    shape = setting.base.config
    placements, reads = STYLES[options.style]
    placements, reads = options.placements or placements, options.reads or reads
    width = _width(options, shape.hidden_size, problems)
    activation, scaling = options.non_linearity, options.scaling
    for layer in options.leave_out:
        if layer >= shape.num_layers:
            text = f"leave_out: there is no layer {layer}; they are 0-{shape.num_layers - 1}"
            problems.add("leave_out", text)
    layers = [layer for layer in range(shape.num_layers) if layer not in options.leave_out]
    if not layers:
        problems.add("leave_out", "leave_out: that is every layer; leave at least one")
    problems.check()

    placed = [PLACEMENTS[name] for name in PLACEMENTS if name in placements]
    sites: list[Site] = [(layer, name) for layer in layers for name in placed]
    parameters: dict[str, torch.Tensor] = {}
    for site in sites:
        starts = _starts(shape.hidden_size, width, setting.generator)
        for part, start in zip(_PARTS, starts, strict=True):
            parameters[tensor_name(setting.base, site, part)] = leaf(start, setting.base)

    def change(site: Site) -> BottleneckDelta:
        down, down_bias, up, up_bias = (
            parameters[tensor_name(setting.base, site, part)] for part in _PARTS
        )
        return BottleneckDelta(
            down=down,
            up=up.T * scaling,
            down_bias=down_bias,
            up_bias=up_bias * scaling,
            activation=Activation[ACTIVATIONS[activation].upper()],
            reads=Reads[reads.upper()],
        )

    config = config_of(
        setting,
        "BOTTLENECK",
        bottleneck_size=width,
        non_linearity=activation,
        placements=[name for name in PLACEMENTS if name in placements],
        reads=reads,
        scaling=scaling,
    )
    return PlainAdapter(
        parameters,
        lambda: AdapterDelta({site: change(site) for site in sites}),
        config,
        undecayed=[name for name in parameters if name.endswith(".bias")],
    )


def _width(options: BottleneckOptions, hidden: int, problems: OptionProblems) -> int:
    """Returns the width of a bottleneck; one that cannot be served is a problem."""
    largest, factor = AdapterLimits().max_rank, options.reduction_factor
    if options.bottleneck_size is not None:
        if "reduction_factor" in options.model_fields_set:
            text = "bottleneck_size: it sets the width, as reduction_factor does; give one of them"
            problems.add("bottleneck_size", text)
        return options.bottleneck_size
    width = max(1, round(hidden / factor))
    if width > largest:
        problems.add(
            "reduction_factor",
            f"reduction_factor: {factor:g} makes bottlenecks of {width}; at most {largest} are "
            f"served, so take at least {hidden / largest:g}",
        )
    return width


def _starts(hidden: int, width: int, generator: torch.Generator) -> Sequence[torch.Tensor]:
    """Returns the initial values of `_PARTS`."""
    bound = hidden**-0.5
    down = torch.empty(width, hidden).uniform_(-bound, bound, generator=generator)
    return down, torch.zeros(width), torch.zeros(hidden, width), torch.zeros(hidden)
