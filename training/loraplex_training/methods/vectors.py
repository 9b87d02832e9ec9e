"""One vector per projection: (IA)3's gains and BitFit's biases. Untrained, both change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loraplex_adapters.format.patterns import suffixes
from loraplex_model.adapters.delta import ProjectionDelta
from loraplex_model.base.config import Site
from loraplex_model.base.weights import BaseWeights

from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.methods.options import Names, OptionProblems, TargetOptions
from loraplex_training.methods.plain import PlainAdapter, config_of, divided, leaf, tensor_name
from loraplex_training.methods.targets import module_path, sites_of


class Ia3Options(TargetOptions):
    """Options of (IA)3. The defaults are the paper's modules."""

    target_modules: Names = ("k_proj", "v_proj", "down_proj")
    """Modules to scale: names (q_proj), ends of paths, all-linear, attention, mlp or qv."""
    feedforward_modules: Names = ("down_proj",)
    """Target modules whose input is scaled instead of their output."""


def ia3(options: Ia3Options, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """Gains l on projections, initially 1 (Liu et al. 2022, arXiv 2205.05638).

    y = l * (W x + b), or W (l * x) + b for a feed-forward module. Saved as PEFT's IA3.
    """
    shapes = setting.base.config.module_shapes()
    sites = sites_of(options, setting.base, problems)
    inward = _feedforward(options, sites, setting.base, problems)
    problems.check()
    parameters = {}
    for site in sites:
        fan_in, fan_out = shapes[site[1]]
        shape = (1, fan_in) if site in inward else (fan_out, 1)
        parameters[tensor_name(setting.base, site, "ia3_l")] = leaf(torch.ones(shape), setting.base)

    def change(site: Site) -> ProjectionDelta:
        gain = parameters[tensor_name(setting.base, site, "ia3_l")].reshape(-1)
        return ProjectionDelta(in_gain=gain) if site in inward else ProjectionDelta(gain=gain)

    config = config_of(
        setting,
        "IA3",
        target_modules=[module_path(setting.base, site) for site in sites],
        feedforward_modules=[module_path(setting.base, site) for site in sites if site in inward],
    )
    return PlainAdapter(
        parameters,
        lambda: divided({site: change(site) for site in sites}, setting.base),
        config,
        undecayed=parameters,  # a gain that decayed to 0 would remove the base's output
    )


def bitfit(options: TargetOptions, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """Biases on projections, initially 0 (Ben Zaken et al. 2022, arXiv 2106.10199).

    y = W x + b + bias, also where the base has no bias b. Saved as PEFT's BEFT.
    """
    shapes = setting.base.config.module_shapes()
    sites = sites_of(options, setting.base, problems)
    problems.check()
    parameters = {
        tensor_name(setting.base, site, "beft_bias"): leaf(
            torch.zeros(1, shapes[site[1]][1]), setting.base
        )
        for site in sites
    }

    def change(site: Site) -> ProjectionDelta:
        return ProjectionDelta(
            bias=parameters[tensor_name(setting.base, site, "beft_bias")].reshape(-1)
        )

    return PlainAdapter(
        parameters,
        lambda: divided({site: change(site) for site in sites}, setting.base),
        config_of(
            setting, "BEFT", target_modules=[module_path(setting.base, site) for site in sites]
        ),
        undecayed=parameters,
    )


def _feedforward(
    options: Ia3Options, sites: Sequence[Site], base: BaseWeights, problems: OptionProblems
) -> frozenset[Site]:
    """Returns the sites that `feedforward_modules` names by their paths or the ends of them."""
    given = "feedforward_modules" in options.model_fields_set
    found: set[Site] = set()
    for name in options.feedforward_modules:
        named = [site for site in sites if name in suffixes(module_path(base, site))]
        if given and not named:
            problems.add(
                "feedforward_modules",
                f"feedforward_modules: {name!r} is none of the target modules; name those of them "
                "whose input is scaled instead of the output",
            )
        found.update(named)
    return frozenset(found)
