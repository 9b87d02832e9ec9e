"""AdaLoRA (arXiv 2303.10512): y = W x + alpha / (init_r + 1e-5) * B (E * A x), with learned ranks.

A penalty keeps A and B nearly orthogonal, so that E [r, 1] acts as singular values. The importance
of each triplet (a row of A, its E, a column of B) for the loss is measured at every step, and the
least important triplets are cut by a schedule until `target_r` per module remain on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.base.config import Site
from pydantic import Field

from loraplex_training.methods.base import AdapterFiles, Setting, TrainedAdapter
from loraplex_training.methods.options import OptionProblems, Rank, TargetOptions
from loraplex_training.methods.plain import config_of, divided, leaf, stored, tensor_name
from loraplex_training.methods.targets import module_path, sites_of
from loraplex_training.spec.fields import AboveZero, Count, Fraction, NotNegative, Number, Positive

_STD = 0.02  # of A and B at the start; E is 0
_KEPT, _SENSITIVITY, _UNCERTAINTY = "kept.", "sensitivity.", "uncertainty."


class AdaLoraOptions(TargetOptions):
    """Options of AdaLoRA."""

    init_r: Rank = 12
    """Initial rank of every module."""
    target_r: Positive | None = None
    """Average rank of the modules in the end. Default: 8, or init_r if that is lower."""
    lora_alpha: AboveZero | None = None
    """Scale of the change, times r. Default: 2 init_r."""
    lora_dropout: Fraction = 0.0
    """Dropout probability of A's inputs."""
    tinit: Count | None = None
    """Steps before the first cut. Default: a tenth of the job's steps."""
    tfinal: Count | None = None
    """Steps after the last cut. Default: three tenths of the job's steps."""
    deltaT: Positive = 1
    """Steps between cuts."""
    beta1: Annotated[Number, Field(gt=0, lt=1)] = 0.85
    """Smoothing factor of the sensitivity."""
    beta2: Annotated[Number, Field(gt=0, lt=1)] = 0.85
    """Smoothing factor of the uncertainty."""
    orth_reg_weight: NotNegative = 0.5
    """Weight of the penalty that keeps A and B nearly orthogonal."""

    @property
    def alpha(self) -> float:
        """`lora_alpha` or its default."""
        return 2.0 * self.init_r if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, slots=True)
class RankSchedule:
    """Number of triplets after each step; steps count from 1.

    Until `tinit` all are kept. Then the budget falls along a cubic curve, with a cut every
    `delta_t` steps. At `steps - tfinal` it reaches `target`; the other steps train without cuts.
    """

    steps: int
    tinit: int
    tfinal: int
    delta_t: int
    initial: int
    target: int

    @property
    def last(self) -> int:
        """Step of the final cut."""
        return self.steps - self.tfinal

    def budget(self, step: int) -> int | None:
        """Returns the number of triplets to keep after this step; None if it cuts nothing."""
        if step == self.last:
            return self.target
        if step <= self.tinit or step > self.last or step % self.delta_t:
            return None
        ahead = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((self.initial - self.target) * ahead**3 + self.target)


def adalora(options: AdaLoraOptions, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """LoRA whose ranks are cut in training, least important ones first, to a given average.

    Saved as PEFT's ADALORA.
    """
    steps = setting.steps
    sites = sites_of(options, setting.base, problems)
    init_r = options.init_r
    given = min(8, init_r) if options.target_r is None else options.target_r
    target_r = problems.at_most("target_r", given, init_r)
    schedule = RankSchedule(
        steps,
        steps // 10 if options.tinit is None else options.tinit,
        steps * 3 // 10 if options.tfinal is None else options.tfinal,
        options.deltaT,
        init_r * len(sites),
        target_r * len(sites),
    )
    if schedule.tinit >= schedule.last:
        problems.add(
            "tinit",
            f"tinit: {schedule.tinit} steps before and {schedule.tfinal} after leave none of the "
            f"job's {steps} to cut ranks in; make tinit or tfinal smaller, or train longer",
        )
    problems.check()
    return AdaLoraAdapter(setting, options, sites, target_r, schedule)


class AdaLoraAdapter(TrainedAdapter):
    """A `TrainedAdapter` of A, B and E, some of whose triplets are cut in training."""

    def __init__(
        self,
        setting: Setting,
        options: AdaLoraOptions,
        sites: Sequence[Site],
        target_r: int,
        schedule: RankSchedule,
    ) -> None:
        self._setting, self._options = setting, options
        self._sites, self._target_r, self._schedule = sites, target_r, schedule
        self.dropout = options.lora_dropout
        self.settled = schedule.last
        rank = options.init_r
        parameters: dict[str, torch.Tensor] = {}
        shapes = setting.base.config.module_shapes()
        for site in sites:
            fan_in, fan_out = shapes[site[1]]
            a = _STD * torch.randn(rank, fan_in, generator=setting.generator)
            b = _STD * torch.randn(fan_out, rank, generator=setting.generator)
            for name, start in zip(self._names(site), (a, b, torch.zeros(rank, 1)), strict=True):
                parameters[name] = leaf(start, setting.base)
        self.parameters: Mapping[str, torch.Tensor] = parameters
        self._sensitivity = {n: torch.zeros_like(p.detach()) for n, p in parameters.items()}
        self._uncertainty = {n: torch.zeros_like(p.detach()) for n, p in parameters.items()}
        device = setting.base.embed.device
        self._kept = {site: torch.ones(rank, dtype=torch.bool, device=device) for site in sites}

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`."""
        scale = self._options.alpha / (self._options.init_r + 1e-5)
        changes = {}
        for site in self._sites:
            a, b, e = self._of(site)
            changes[site] = ProjectionDelta(a=a * e, b=b.T * scale)
        return divided(changes, self._setting.base)

    def _path(self, site: Site) -> str:
        return module_path(self._setting.base, site)

    def _names(self, site: Site) -> list[str]:
        """The names of a module's A, B and E in PEFT's files."""
        return [tensor_name(self._setting.base, site, f"lora_{letter}") for letter in "ABE"]

    def penalty(self) -> torch.Tensor | None:
        """Returns the mean of |A A^T - 1| and |B^T B - 1| over all modules, times its weight."""
        if not self._options.orth_reg_weight:
            return None
        modules = map(self._of, self._sites)
        skewness = [_skewness(rows) for a, b, _ in modules for rows in (a, b.T)]
        return torch.stack(skewness).mean() * self._options.orth_reg_weight

    def stepped(self, step: int) -> None:
        """Updates the importances from the step's gradients, and cuts by the schedule."""
        schedule = self._schedule
        with torch.no_grad():
            if step < schedule.last:
                self._watch()
            budget = schedule.budget(step)
            if budget is not None:
                self._cut(budget)
            elif step > schedule.last:
                self._clear()

    def state(self) -> Mapping[str, torch.Tensor]:
        """Returns the smoothed sensitivities and uncertainties, and the masks of kept triplets."""
        return {
            **{_SENSITIVITY + name: tensor for name, tensor in self._sensitivity.items()},
            **{_UNCERTAINTY + name: tensor for name, tensor in self._uncertainty.items()},
            **{
                _KEPT + module_path(self._setting.base, site): tensor
                for site, tensor in self._kept.items()
            },
        }

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`. Cut triplets are left out; a module may have none left."""
        tensors: dict[str, torch.Tensor] = {}
        pattern: dict[str, list[bool]] = {}
        for site in self._sites:
            a, b, e = self._of(site)
            # A cut triplet may have grown again before the next cut.
            kept = self._kept[site] | (e.detach()[:, 0] != 0)
            found = (a[kept], b[:, kept], e[kept])
            tensors.update(zip(self._names(site), map(stored, found), strict=True))
            pattern[f"{self._path(site)}.lora_E"] = kept.tolist()
        options, schedule = self._options, self._schedule
        config = config_of(
            self._setting,
            "ADALORA",
            beta1=options.beta1,
            beta2=options.beta2,
            bias="none",
            deltaT=schedule.delta_t,
            fan_in_fan_out=False,
            init_lora_weights=True,
            init_r=options.init_r,
            lora_alpha=int(options.alpha) if options.alpha.is_integer() else options.alpha,
            lora_dropout=options.lora_dropout,
            orth_reg_weight=options.orth_reg_weight,
            rank_pattern=pattern,
            target_modules=[self._path(site) for site in self._sites],
            target_r=self._target_r,
            tfinal=schedule.tfinal,
            tinit=schedule.tinit,
            total_step=schedule.steps,
        )
        return AdapterFiles(config, tensors)

    def _of(self, site: Site) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns a module's A [r, in], B [out, r] and E [r, 1]."""
        a, b, e = (self.parameters[name] for name in self._names(site))
        return a, b, e

    def _watch(self) -> None:
        """Smooths |p * gradient| of every parameter p, and its variation (section 3.3)."""
        beta1, beta2 = self._options.beta1, self._options.beta2
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            importance = (parameter * parameter.grad).abs()
            mean, spread = self._sensitivity[name], self._uncertainty[name]
            mean.mul_(beta1).add_(importance, alpha=1 - beta1)
            spread.mul_(beta2).add_((importance - mean).abs(), alpha=1 - beta2)

    def _cut(self, budget: int) -> None:
        """Keeps the `budget` most important triplets of all modules together."""
        scores = torch.cat([self._scores(site) for site in self._sites])
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[scores.argsort(stable=True)[: len(scores) - budget]] = False
        parts = torch.split(kept, self._options.init_r)
        for site, own in zip(self._sites, parts, strict=True):
            self._kept[site].copy_(own)
        self._clear()

    def _scores(self, site: Site) -> torch.Tensor:
        """Importances [r]: that of E plus the means over A's row and B's column."""
        a, b, e = (self._sensitivity[name] * self._uncertainty[name] for name in self._names(site))
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def _clear(self) -> None:
        for site, kept in self._kept.items():
            self._of(site)[2].masked_fill_(~kept[:, None], 0.0)


def _skewness(rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows' distance from orthonormal, |P P^T - 1| in the Frobenius norm."""
    unit = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    distance: torch.Tensor = torch.linalg.matrix_norm(rows @ rows.T - unit)
    return distance
