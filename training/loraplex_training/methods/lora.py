"""LoRA (arXiv 2106.09685): y = W x + s B A x, with A and B trained.

Scales are alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); B may have a higher learning
rate than A (LoRA+, arXiv 2402.12354); ranks and alphas may differ by module. The file is a plain
LoRA for all initial values of A and B.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, LoraFactors
from loraplex_model.adapters.delta import lora as lora_delta
from loraplex_model.base.config import Site
from loraplex_model.base.weights import BaseWeights
from pydantic import Field

from loraplex_training.methods.base import (
    AdapterFiles,
    Observe,
    ParameterGroup,
    Setting,
    TrainedAdapter,
)
from loraplex_training.methods.initial import Initialise, StartOptions, initialisation
from loraplex_training.methods.options import Alphas, OptionProblems, Rank, Ranks
from loraplex_training.methods.plain import config_of, leaf
from loraplex_training.methods.targets import HEAD, by_site, sites_of
from loraplex_training.spec.fields import AboveZero, Fraction

Number = TypeVar("Number", int, float)

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


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """LoRA's options, module by module.

    Attributes:
        ranks: rank of every adapted module, in the order of the model.
        alphas: alpha of every adapted module; scale = alpha / rank, or alpha / sqrt(rank) with
            `use_rslora`.
        dropout: dropout probability of A's inputs.
        ratio: learning rate of B divided by that of A.
    """

    ranks: Mapping[Site, int]
    alphas: Mapping[Site, float]
    use_rslora: bool
    dropout: float
    ratio: float

    def scale(self, site: Site) -> float:
        """Returns the factor of B A."""
        rank = self.ranks[site]
        return self.alphas[site] / (math.sqrt(rank) if self.use_rslora else rank)


def lora(options: LoraOptions, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """Low-rank matrices A and B beside projections, and beside the head if it is named.

    Saved as PEFT's LORA.
    """
    layout, pairs = make_pairs(options, setting, problems, head=True)
    return LoraAdapter(setting, layout, pairs)


def make_pairs(
    options: LoraOptions, setting: Setting, problems: OptionProblems, head: bool = False
) -> tuple[LoraLayout, Pairs]:
    """Checks the options and makes A and B; with `head`, the output head may be named.

    Raises Refusal METHOD_INVALID with every problem.
    """
    sites = sites_of(options, setting.base, problems, head=head)
    init, dropout = options.init, options.lora_dropout
    # PiSSA's file has twice the rank.
    most = AdapterLimits().max_rank // (2 if init == "pissa" else 1)
    r = problems.at_most("r", options.r, most)
    alpha = 2.0 * r if options.lora_alpha is None else options.lora_alpha
    ranks = by_site("rank_pattern", options.rank_pattern, sites, problems)
    problems.at_most("rank_pattern", max(ranks.values(), default=1), most)
    alphas = by_site("alpha_pattern", options.alpha_pattern, sites, problems)
    if HEAD in sites and dropout:
        text = "lora_dropout: the head's inputs are not dropped; target one or the other"
        problems.add("lora_dropout", text)
    if HEAD in sites and init in ("pissa", "loftq"):
        problems.add("init", f"init: the head is not quantised, so it has no {init} start")
    layout = LoraLayout(
        {site: ranks.get(site, r) for site in sites},
        {site: alphas.get(site, alpha) for site in sites},
        options.use_rslora,
        dropout,
        options.loraplus_lr_ratio,
    )
    start = initialisation(options, setting.base, layout.ranks, setting.generator, problems)
    problems.check()
    return layout, Pairs(setting.base, layout, start)


class Pairs:
    """The trained A and B of every module, and their initial values where these are subtracted."""

    def __init__(self, base: BaseWeights, layout: LoraLayout, initialise: Initialise) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        self._layout = layout
        self._first: dict[str, torch.Tensor] = {}
        for site, rank in layout.ranks.items():
            start = initialise(site, rank, layout.scale(site))
            for name, value in zip(names_of(site), (start.a, start.b), strict=True):
                self.parameters[name] = leaf(value, base)
                if start.subtracted:
                    self._first[name] = self.parameters[name].detach().clone()

    def at(self, site: Site) -> LoraFactors:
        """Returns a module's differentiable factors, of twice the rank if a start is subtracted."""
        a, b = names_of(site)
        scale = self._layout.scale(site)
        if a not in self._first:
            return LoraFactors(self.parameters[a], self.parameters[b], scale)
        return LoraFactors(
            torch.cat([self.parameters[a], self._first[a]]),
            torch.cat([self.parameters[b], -self._first[b]], dim=1),
            scale,
        )

    def groups(self) -> list[ParameterGroup]:
        """Returns a group of the A's and one of the B's, or one of all if their rates are equal."""
        ratio = self._layout.ratio
        if ratio == 1.0:
            return [ParameterGroup(tuple(self.parameters))]
        names = [names_of(site) for site in self._layout.ranks]
        return [
            ParameterGroup(tuple(a for a, _ in names)),
            ParameterGroup(tuple(b for _, b in names), ratio),
        ]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the initial values that are subtracted."""
        return {_FIRST + name: tensor for name, tensor in self._first.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` returned."""
        for name, tensor in self._first.items():
            tensor.copy_(state[_FIRST + name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the file."""
        found = {}
        for site in self._layout.ranks:
            factors = self.at(site)
            for name, tensor in zip(names_of(site), (factors.a, factors.b), strict=True):
                found[name] = stored(tensor)
        return found

    def config(self, setting: Setting, **more: object) -> dict[str, object]:
        """Returns the file's configuration, with full paths, which no other module matches."""
        layout, doubled = self._layout, bool(self._first)
        ranks = {site: rank << doubled for site, rank in layout.ranks.items()}
        alphas = {site: alpha * (1 + doubled) for site, alpha in layout.alphas.items()}
        if doubled and layout.use_rslora:  # the root of twice the rank would change the scale
            alphas = {site: layout.scale(site) * rank for site, rank in ranks.items()}
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
            lora_dropout=layout.dropout,
            r=r,
            rank_pattern=rank_pattern,
            target_modules=[module_path(*site) for site in ranks],
            use_rslora=layout.use_rslora and not doubled,
            **more,
        )


class LoraAdapter:
    """A `TrainedAdapter` that adds s B A to projections."""

    def __init__(self, setting: Setting, layout: LoraLayout, pairs: Pairs) -> None:
        self.parameters: Mapping[str, torch.Tensor] = pairs.parameters
        self.dropout = layout.dropout
        self.settled = 0
        self._setting, self._layout, self._pairs = setting, layout, pairs

    def prepare(self, observe: Observe) -> None:
        """Does nothing: LoRA chooses nothing from data."""

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`."""
        return self._pairs.groups()

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`."""
        return lora_delta({site: self._pairs.at(site) for site in self._layout.ranks})

    def penalty(self) -> None:
        """Returns None: LoRA has no penalty."""

    def stepped(self, step: int) -> None:
        """Does nothing."""

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
    """Returns the names of a module's A and B in PEFT's files."""
    path = PREFIX + module_path(*site)
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy for the file: float32, on the CPU, contiguous."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _common(values: Mapping[Site, Number]) -> tuple[Number, dict[str, Number]]:
    """Returns the most common value, and the other values by module path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module_path(*site): v for site, v in values.items() if v != common}


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
