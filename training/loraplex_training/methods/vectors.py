"""One vector a projection: (IA)3's gains and BitFit's biases. Both change nothing at the start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_adapters.format.patterns import suffixes
from loraplex_model.adapters.delta import AdapterDelta, SiteDelta
from loraplex_model.base.config import Site

from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.options import Options
from loraplex_training.methods.plain import PlainAdapter, config_of, leaf
from loraplex_training.methods.targets import read_sites


def ia3(options: Options, setting: Setting) -> TrainedAdapter:
    """Gains, 1 at the start (Liu et al. 2022, arXiv 2205.05638), PEFT's IA3.

    y = l * (W x + b), or W (l * x) + b for a feed-forward module. Options: `target_modules`,
    `layers`; `feedforward_modules`, those of them whose input is scaled. The paper's are the
    default: keys, values, and what goes into `down_proj`.
    """
    shapes = setting.base.config.projection_shapes()
    sites = read_sites(options, setting.base, "k_proj,v_proj,down_proj")
    inward = _feedforward(options, sites)
    options.done()
    parameters = {}
    for site in sites:
        fan_in, fan_out = shapes[site[1]]
        shape = (1, fan_in) if site in inward else (fan_out, 1)
        parameters[_name(site, "ia3_l")] = leaf(torch.ones(shape), setting.base)

    def change(site: Site) -> SiteDelta:
        gain = parameters[_name(site, "ia3_l")].reshape(-1)
        return SiteDelta(in_gain=gain) if site in inward else SiteDelta(gain=gain)

    config = config_of(
        setting,
        "IA3",
        target_modules=[module_path(*site) for site in sites],
        feedforward_modules=[module_path(*site) for site in sites if site in inward],
    )
    return PlainAdapter(
        parameters,
        lambda: AdapterDelta({site: change(site) for site in sites}),
        config,
        lambda: parameters,
        undecayed=parameters,  # decay pulls to 0, where a gain has nothing of the base left
    )


def bitfit(options: Options, setting: Setting) -> TrainedAdapter:
    """Biases (Ben Zaken et al. 2022, arXiv 2106.10199), also where the base has none: PEFT's BEFT.

    y = W x + b + bias, with zeros at the start. Options: `target_modules` (all projections),
    `layers`.
    """
    shapes = setting.base.config.projection_shapes()
    sites = read_sites(options, setting.base)
    options.done()
    parameters = {
        _name(site, "beft_bias"): leaf(torch.zeros(1, shapes[site[1]][1]), setting.base)
        for site in sites
    }

    def change(site: Site) -> SiteDelta:
        return SiteDelta(bias=parameters[_name(site, "beft_bias")].reshape(-1))

    return PlainAdapter(
        parameters,
        lambda: AdapterDelta({site: change(site) for site in sites}),
        config_of(setting, "BEFT", target_modules=[module_path(*site) for site in sites]),
        lambda: parameters,
        undecayed=parameters,
    )


def _feedforward(options: Options, sites: Sequence[Site]) -> frozenset[Site]:
    """Those of the sites that `feedforward_modules` names: by paths or the ends of them."""
    given = options.given("feedforward_modules")
    found: set[Site] = set()
    for name in options.names("feedforward_modules", ("down_proj",)):
        named = [site for site in sites if name in suffixes(module_path(*site))]
        if given and not named:
            options.refuse(
                f"feedforward_modules: {name!r} is none of the target modules; it says of which "
                "of them the input is scaled instead of the output"
            )
        found.update(named)
    return frozenset(found)


def _name(site: Site, ending: str) -> str:
    return f"{PREFIX}{module_path(*site)}.{ending}"
