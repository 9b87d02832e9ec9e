"""LoRA (arXiv 2106.09685): y = W x + s B A x, with A and B trained.

Scales are alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); B may have a higher learning
rate than A (LoRA+, arXiv 2402.12354); ranks and alphas may differ by module. The file is a plain
LoRA for all initial values of A and B.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, LoraFactors
from loraplex_model.adapters.delta import lora as lora_delta
from loraplex_model.base.config import Site
from loraplex_model.base.weights import BaseWeights
from pydantic import Field

from loraplex_training.methods.base import AdapterFiles, ParameterGroup, Setting, TrainedAdapter
from loraplex_training.methods.initial import Initialise, StartOptions, initialisation
from loraplex_training.methods.options import Alphas, OptionProblems, Rank, Ranks
from loraplex_training.methods.plain import config_of, divided, leaf, stored, tensor_name
from loraplex_training.methods.targets import HEAD, Number, by_site, module_path, sites_of
from loraplex_training.spec.fields import AboveZero, Fraction

_FIRST = "first."


class LoraOptions(StartOptions):
    """Options of LoRA and DoRA."""

    r: Rank = 16
    """Rank of A and B."""
    lora_alpha: AboveZero | None = None
    """Scale of B A, times r. Default: 2 r."""
    use_rslora: bool = False
    """Divide lora_alpha by the square root of r instead of by r."""
    rank_pattern: Annotated[Ranks, Field(default_factory=dict)]
    """Ranks of modules that differ from r: q_proj=4,k_proj=8."""
    alpha_pattern: Annotated[Alphas, Field(default_factory=dict)]
    """Alphas of modules that differ from lora_alpha."""
    lora_dropout: Fraction = 0.0
    """Dropout probability of A's inputs."""
    loraplus_lr_ratio: AboveZero = 1.0
    """Learning rate of B divided by that of A (LoRA+)."""


def lora(options: LoraOptions, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """Low-rank matrices A and B beside projections, and beside the head if it is named.

    Saved as PEFT's LORA.
    """
    return make_lora(options, setting, problems, head=True)


def make_lora(
    options: LoraOptions, setting: Setting, problems: OptionProblems, head: bool = False
) -> LoraAdapter:
    """Checks the options and makes A and B; with `head`, the output head may be named.

    Raises Refusal METHOD_INVALID with every problem.
    """
    sites = sites_of(options, setting.base, problems, head=head)
    init = options.init
    # PiSSA's file has twice the rank.
    most = AdapterLimits().max_rank // (2 if init == "pissa" else 1)
    r = problems.at_most("r", options.r, most)
    alpha = 2.0 * r if options.lora_alpha is None else options.lora_alpha
    ranks = by_site("rank_pattern", options.rank_pattern, sites, setting.base, problems)
    problems.at_most("rank_pattern", max(ranks.values(), default=1), most)
    alphas = by_site("alpha_pattern", options.alpha_pattern, sites, setting.base, problems)
    if HEAD in sites and options.lora_dropout:
        text = "lora_dropout: the head's inputs are not dropped; target one or the other"
        problems.add("lora_dropout", text)
    if HEAD in sites and init in ("pissa", "loftq"):
        problems.add("init", f"init: the head is not quantised, so it has no {init} start")
    ranks = {site: ranks.get(site, r) for site in sites}
    alphas = {site: alphas.get(site, alpha) for site in sites}
    start = initialisation(options, setting.base, ranks, setting.generator, problems)
    problems.check()
    return LoraAdapter(setting, options, ranks, alphas, start)


class LoraAdapter(TrainedAdapter):
    """A `TrainedAdapter` that adds s B A to projections.

    Attributes:
        ranks: rank of every adapted module, in the order of the model.
    """

    def __init__(
        self,
        setting: Setting,
        options: LoraOptions,
        ranks: Mapping[Site, int],
        alphas: Mapping[Site, float],
        initialise: Initialise,
    ) -> None:
        self.ranks = ranks
        self.dropout = options.lora_dropout
        self._setting, self._options, self._alphas = setting, options, alphas
        parameters: dict[str, torch.Tensor] = {}
        for site, rank in ranks.items():
            start = initialise(site, rank, self._scale(site))
            for name, value in zip(self.names_of(site), start, strict=True):
                parameters[name] = leaf(value, setting.base)
        self.parameters: Mapping[str, torch.Tensor] = parameters
        subtracted = parameters if options.init == "pissa" else {}
        self._first = {name: tensor.detach().clone() for name, tensor in subtracted.items()}

    def groups(self) -> list[ParameterGroup]:
        """Returns a group of the A's and one of the B's, or one of all if their rates are equal."""
        ratio = self._options.loraplus_lr_ratio
        if ratio == 1.0:
            return [ParameterGroup(tuple(self.parameters))]
        a, b = zip(*map(self.names_of, self.ranks), strict=True)
        return [ParameterGroup(a), ParameterGroup(b, ratio)]

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`."""
        whole = lora_delta({site: self.at(site) for site in self.ranks})
        return divided(whole.sites, self._setting.base)

    def at(self, site: Site) -> LoraFactors:
        """Returns a module's differentiable factors, of twice the rank if a start is subtracted."""
        a, b = self.names_of(site)
        scale = self._scale(site)
        if not self._first:
            return LoraFactors(self.parameters[a], self.parameters[b], scale)
        return LoraFactors(
            torch.cat([self.parameters[a], self._first[a]]),
            torch.cat([self.parameters[b], -self._first[b]], dim=1),
            scale,
        )

    def state(self) -> Mapping[str, torch.Tensor]:
        """Returns the initial values that are subtracted."""
        return {_FIRST + name: tensor for name, tensor in self._first.items()}

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`. Full paths of modules, which no other module matches."""
        base, rslora, doubled = self._setting.base, self._options.use_rslora, bool(self._first)
        ranks = {site: rank << doubled for site, rank in self.ranks.items()}
        alphas = {site: alpha * (1 + doubled) for site, alpha in self._alphas.items()}
        if doubled and rslora:  # the root of twice the rank would change the scale
            alphas = {site: self._scale(site) * rank for site, rank in ranks.items()}
        r, rank_pattern = _common(ranks, base)
        alpha, alpha_pattern = _common(alphas, base)
        config = config_of(
            self._setting,
            "LORA",
            alpha_pattern={path: _plain(value) for path, value in alpha_pattern.items()},
            bias="none",
            fan_in_fan_out=False,
            init_lora_weights=True,
            lora_alpha=_plain(alpha),
            lora_dropout=self.dropout,
            r=r,
            rank_pattern=rank_pattern,
            target_modules=[module_path(base, site) for site in ranks],
            use_rslora=rslora and not doubled,
        )
        tensors: dict[str, torch.Tensor] = {}
        for site in ranks:
            factors = self.at(site)
            tensors |= zip(self.names_of(site), map(stored, (factors.a, factors.b)), strict=True)
        return AdapterFiles(config, tensors)

    def names_of(self, site: Site) -> tuple[str, str]:
        """Returns the names of a module's parameters A and B, which are those in PEFT's files."""
        return names_of(self._setting.base, site)

    def _scale(self, site: Site) -> float:
        """Returns the factor of B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        rank = self.ranks[site]
        return self._alphas[site] / (math.sqrt(rank) if self._options.use_rslora else rank)


def names_of(base: BaseWeights, site: Site) -> tuple[str, str]:
    """Returns the names of a module's A and B in PEFT's files."""
    return tensor_name(base, site, "lora_A.weight"), tensor_name(base, site, "lora_B.weight")


def _common(values: Mapping[Site, Number], base: BaseWeights) -> tuple[Number, dict[str, Number]]:
    """Returns the most common value, and the other values by module path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module_path(base, site): v for site, v in values.items() if v != common}


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
