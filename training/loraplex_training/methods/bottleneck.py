"""Bottleneck adapters: small networks beside or behind a block, in our own format.

stream += scaling * up(f(down(x))), biases included. `up` and its bias start at zero, so nothing is
changed at the start; `down` starts as torch's linear layers do, its bias at zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from loraplex_adapters.format.kinds.bottleneck import ACTIVATIONS, PLACEMENTS, READS
from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import Activation, AdapterDelta, Reads, SiteDelta
from loraplex_model.base.config import Site

from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.options import Options
from loraplex_training.methods.plain import PlainAdapter, config_of, leaf

STYLES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "houlsby": (("attention", "mlp"), "output"),
    "pfeiffer": (("mlp",), "stream"),
    "parallel": (("mlp",), "normed"),
}
"""Where each paper's bottlenecks stand and what they read: Houlsby et al. 2019 (arXiv 1902.00751),
Pfeiffer et al. 2020 (arXiv 2005.00247), He et al. 2021 (arXiv 2110.04366)."""

_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def bottleneck(options: Options, setting: Setting) -> TrainedAdapter:
    """The project's BOTTLENECK kind; see docs/adapters.md for the format.

    Options: `style`, one of `STYLES`, or `placements` and `reads` of one's own;
    `reduction_factor` (hidden size over width), or the width as `bottleneck_size`; `non_linearity`;
    `scaling`; `leave_out`: layers that get none.
    """
    shape = setting.base.config
    placements, reads = STYLES[options.choice("style", "pfeiffer", STYLES)]
    placements = options.names("placements", placements)
    for name in placements:
        if name not in PLACEMENTS:
            options.refuse(f"placements: {name!r} is none of {', '.join(PLACEMENTS)}")
    reads = options.choice("reads", reads, READS)
    width = _width(options, shape.hidden_size)
    activation = options.choice("non_linearity", "relu", ACTIVATIONS)
    scaling = options.number("scaling", 1.0, above=0.0, maximum=AdapterLimits().max_scale)
    left_out = options.integers("leave_out", ())
    for layer in left_out:
        if layer >= shape.num_layers:
            options.refuse(
                f"leave_out: there is no layer {layer}; they are 0-{shape.num_layers - 1}"
            )
    layers = [layer for layer in range(shape.num_layers) if layer not in left_out]
    if not layers:
        options.refuse("leave_out: that is every layer; leave at least one")
    options.done()

    placed = [PLACEMENTS[name] for name in PLACEMENTS if name in placements]
    sites: list[Site] = [(layer, name) for layer in layers for name in placed]
    parameters: dict[str, torch.Tensor] = {}
    for site in sites:
        starts = _starts(shape.hidden_size, width, setting.generator)
        parameters |= {_name(site, part): leaf(starts[part], setting.base) for part in _PARTS}

    def change(site: Site) -> SiteDelta:
        down, hidden_bias, up, bias = (parameters[_name(site, part)] for part in _PARTS)
        return SiteDelta(
            a=down,
            b=up.T * scaling,
            hidden_bias=hidden_bias,
            bias=bias * scaling,
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
        lambda: parameters,
        undecayed=[name for name in parameters if name.endswith(".bias")],
    )


def _width(options: Options, hidden: int) -> int:
    """What is served at most is held against what comes out, too."""
    largest = AdapterLimits().max_rank
    factor = options.number("reduction_factor", 16.0, above=0.0)
    width = options.integer("bottleneck_size", 0, 1, largest)
    if not options.given("bottleneck_size"):
        width = max(1, round(hidden / factor))
        if width > largest:
            options.refuse(
                f"reduction_factor: {factor:g} makes bottlenecks of {width}; at most {largest} are "
                f"served, so take at least {hidden / largest:g}"
            )
    elif options.given("reduction_factor"):
        options.refuse("bottleneck_size: it says what reduction_factor says; give one of them")
    return width


def _starts(hidden: int, width: int, generator: torch.Generator) -> Mapping[str, torch.Tensor]:
    bound = hidden**-0.5
    return {
        "down.weight": torch.empty(width, hidden).uniform_(-bound, bound, generator=generator),
        "down.bias": torch.zeros(width),
        "up.weight": torch.zeros(hidden, width),
        "up.bias": torch.zeros(hidden),
    }


def _name(site: Site, part: str) -> str:
    return f"{PREFIX}{module_path(*site)}.bottleneck_{part}"
