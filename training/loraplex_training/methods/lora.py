"""LoRA (arXiv 2106.09685): y = W x + s B A x, with A and B trained, in many shapes.

Scales are alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); B may learn faster than A
(LoRA+, arXiv 2402.12354); ranks and alphas may differ by module. Whatever A and B started from, the
file is a plain LoRA, which says all there is to know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, LoraFactors
from loraplex_model.adapters.delta import lora as lora_delta
from loraplex_model.base.config import Site
from loraplex_model.base.weights import BaseWeights

from loraplex_training.methods.base import (
    AdapterFiles,
    Observe,
    ParameterGroup,
    Setting,
    TrainedAdapter,
)
from loraplex_training.methods.initial import INITIALISATIONS, Initialise, read_initialisation
from loraplex_training.methods.options import Options
from loraplex_training.methods.plain import config_of, leaf
from loraplex_training.methods.targets import HEAD, read_pattern, read_sites

Number = TypeVar("Number", int, float)

_FIRST = "first."


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was asked for, module by module.

    Attributes:
        ranks: of every module that is adapted, in the order of the model.
        alphas: of the same; scale = alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        dropout: of A's inputs.
        ratio: the learning rate of B over that of A.
        init: one of `INITIALISATIONS`.
    """

    ranks: Mapping[Site, int]
    alphas: Mapping[Site, float]
    use_rslora: bool
    dropout: float
    ratio: float
    init: str

    def scale(self, site: Site) -> float:
        """The factor on B A."""
        rank = self.ranks[site]
        return self.alphas[site] / (math.sqrt(rank) if self.use_rslora else rank)


def lora(options: Options, setting: Setting) -> TrainedAdapter:
    """PEFT's LORA.

    Options: `target_modules`, `layers`, `r`, `lora_alpha` (by default twice r), `use_rslora`,
    `rank_pattern`, `alpha_pattern`, `lora_dropout`, `loraplus_lr_ratio`, `init` and what belongs to
    it (see `initial`).
    """
    recipe = read_recipe(options, setting, head=True)
    initialise = read_initialisation(
        options, recipe.init, setting.base, recipe.ranks, setting.generator
    )
    options.done()
    return LoraAdapter(setting, recipe, Pairs(setting.base, recipe, initialise))


def read_recipe(options: Options, setting: Setting, head: bool = False) -> Recipe:
    """The options of A and B, but for those that belong to what they start from.

    `head`: the output head may be among the targets.
    """
    sites = read_sites(options, setting.base, head=head)
    init = options.choice("init", "default", INITIALISATIONS)
    # PiSSA's file has twice the rank.
    most = AdapterLimits().max_rank // (2 if init == "pissa" else 1)
    r = options.integer("r", 16, 1, most)
    alpha = options.number("lora_alpha", 2.0 * r, above=0)
    pattern = read_pattern(options, "rank_pattern", sites, whole=True)
    ranks = {site: int(rank) for site, rank in pattern.items()}
    if ranks and max(ranks.values()) > most:
        options.refuse(f"rank_pattern: {max(ranks.values())} is above {most}, which is the most")
    alphas = read_pattern(options, "alpha_pattern", sites)
    dropout = options.number("lora_dropout", 0.0, minimum=0, below=1)
    if HEAD in sites and dropout:
        options.refuse("lora_dropout: the head's inputs are not dropped; target one or the other")
    if HEAD in sites and init in ("pissa", "loftq"):
        options.refuse(f"init: the head is not quantised, so it has no {init} start")
    return Recipe(
        {site: ranks.get(site, r) for site in sites},
        {site: alphas.get(site, alpha) for site in sites},
        options.flag("use_rslora", False),
        dropout,
        options.number("loraplus_lr_ratio", 1.0, above=0),
        init,
    )


class Pairs:
    """The trained A and B of every module, and what they started from where that is taken off."""

    def __init__(self, base: BaseWeights, recipe: Recipe, initialise: Initialise) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        self._recipe = recipe
        self._first: dict[str, torch.Tensor] = {}
        for site, rank in recipe.ranks.items():
            start = initialise(site, rank, recipe.scale(site))
            for name, value in zip(names_of(site), (start.a, start.b), strict=True):
                self.parameters[name] = leaf(value, base)
                if start.subtracted:
                    self._first[name] = self.parameters[name].detach().clone()

    def at(self, site: Site) -> LoraFactors:
        """A module's whole change; differentiable. Twice as wide where a start is taken off."""
        a, b = names_of(site)
        scale = self._recipe.scale(site)
        if a not in self._first:
            return LoraFactors(self.parameters[a], self.parameters[b], scale)
        return LoraFactors(
            torch.cat([self.parameters[a], self._first[a]]),
            torch.cat([self.parameters[b], -self._first[b]], dim=1),
            scale,
        )

    def groups(self) -> list[ParameterGroup]:
        """The A's, then the B's at their own rate; one group where that is the same."""
        ratio = self._recipe.ratio
        if ratio == 1.0:
            return [ParameterGroup(tuple(self.parameters))]
        names = [names_of(site) for site in self._recipe.ranks]
        return [
            ParameterGroup(tuple(a for a, _ in names)),
            ParameterGroup(tuple(b for _, b in names), ratio),
        ]

    def state(self) -> dict[str, torch.Tensor]:
        """The starts that are taken off."""
        return {_FIRST + name: tensor for name, tensor in self._first.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes `state` back."""
        for name, tensor in self._first.items():
            tensor.copy_(state[_FIRST + name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The file's."""
        found = {}
        for site in self._recipe.ranks:
            factors = self.at(site)
            for name, tensor in zip(names_of(site), (factors.a, factors.b), strict=True):
                found[name] = stored(tensor)
        return found

    def config(self, setting: Setting, **more: object) -> dict[str, object]:
        """The file's configuration: full paths, so that nothing else can be meant."""
        recipe, doubled = self._recipe, bool(self._first)
        ranks = {site: rank << doubled for site, rank in recipe.ranks.items()}
        alphas = {site: alpha * (1 + doubled) for site, alpha in recipe.alphas.items()}
        if doubled and recipe.use_rslora:  # the root of twice the rank would be another scale
            alphas = {site: recipe.scale(site) * rank for site, rank in ranks.items()}
        r, rank_pattern = _common(ranks)
        alpha, alpha_pattern = _common(alphas)
        return config_of(
            setting,
            "LORA",
            alpha_pattern={path: _plain(value) for path, value in alpha_pattern.items()},
            bias="none",
            fan_in_fan_out=False,
            init_lora_weights=True,
            lora_alpha=_plain(alpha),
            lora_dropout=recipe.dropout,
            r=r,
            rank_pattern=rank_pattern,
            target_modules=[module_path(*site) for site in ranks],
            use_rslora=recipe.use_rslora and not doubled,
            **more,
        )


class LoraAdapter:
    """A `TrainedAdapter`."""

    def __init__(self, setting: Setting, recipe: Recipe, pairs: Pairs) -> None:
        self.parameters: Mapping[str, torch.Tensor] = pairs.parameters
        self.dropout = recipe.dropout
        self.settled = 0
        self._setting, self._recipe, self._pairs = setting, recipe, pairs

    def prepare(self, observe: Observe) -> None:
        """Nothing is chosen from data."""

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`."""
        return self._pairs.groups()

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`."""
        return lora_delta({site: self._pairs.at(site) for site in self._recipe.ranks})

    def penalty(self) -> None:
        """There is none."""

    def stepped(self, step: int) -> None:
        """Nothing follows a step."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """See `TrainedAdapter`."""
        return self._pairs.state()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `TrainedAdapter`."""
        self._pairs.restore(state)

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`."""
        return AdapterFiles(self._pairs.config(self._setting), self._pairs.tensors())


def names_of(site: Site) -> tuple[str, str]:
    """A module's A and B as PEFT's files call them."""
    path = PREFIX + module_path(*site)
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A copy for the file: float32, on the CPU, contiguous."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _common(values: Mapping[Site, Number]) -> tuple[Number, dict[str, Number]]:
    """The most common value, and by module path those that are not."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module_path(*site): v for site, v in values.items() if v != common}


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
