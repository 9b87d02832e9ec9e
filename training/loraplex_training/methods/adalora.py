"""AdaLoRA (arXiv 2303.10512): y = W x + alpha / (init_r + 1e-5) * B (E * A x), ranks chosen on the
way.

A and B are kept near to orthogonal by a penalty, so that E [r, 1] are like singular values. What
a triplet (a row of A, its E, a column of B) does for the loss is watched at every step, and the
least important ones are cut, by a schedule, until `target_r` a module are left on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, SiteDelta
from loraplex_model.base.config import Site

from loraplex_training.methods.base import (
    AdapterFiles,
    Observe,
    ParameterGroup,
    Setting,
    TrainedAdapter,
)
from loraplex_training.methods.lora import stored
from loraplex_training.methods.options import Options
from loraplex_training.methods.plain import config_of, leaf
from loraplex_training.methods.targets import read_sites

_STD = 0.02  # of A and B at the start; E is 0
_KEPT, _SENSITIVITY, _UNCERTAINTY = "kept.", "sensitivity.", "uncertainty."


@dataclass(frozen=True, slots=True)
class Schedule:
    """When how many triplets are left; steps count from 1.

    Until `tinit` there are all. Then the budget falls by a cubic curve, cut every `delta_t` steps;
    at `steps - tfinal` it is `target` for good, and the rest of the steps trains what is left.
    """

    steps: int
    tinit: int
    tfinal: int
    delta_t: int
    initial: int
    target: int

    @property
    def last(self) -> int:
        """The step of the final cut."""
        return self.steps - self.tfinal

    def budget(self, step: int) -> int | None:
        """How many triplets to leave after this step; None: nothing is cut."""
        if step == self.last:
            return self.target
        if step <= self.tinit or step > self.last or step % self.delta_t:
            return None
        ahead = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((self.initial - self.target) * ahead**3 + self.target)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for; `beta1` and `beta2` smooth sensitivity and uncertainty."""

    sites: tuple[Site, ...]
    init_r: int
    target_r: int
    alpha: float
    dropout: float
    schedule: Schedule
    beta1: float
    beta2: float
    orthogonality: float


def adalora(options: Options, setting: Setting) -> TrainedAdapter:
    """PEFT's ADALORA.

    Options: `target_modules`, `layers`, `init_r`, `target_r`, `lora_alpha` (by default twice
    init_r), `lora_dropout`, `tinit` and `tfinal` (by default a tenth and three tenths of the job's
    steps), `deltaT`, `beta1`, `beta2`, `orth_reg_weight`.
    """
    steps = setting.steps
    sites = read_sites(options, setting.base)
    init_r = options.integer("init_r", 12, 1, AdapterLimits().max_rank)
    target_r = options.integer("target_r", min(8, init_r), 1, init_r)
    alpha = options.number("lora_alpha", 2.0 * init_r, above=0)
    schedule = Schedule(
        steps,
        options.integer("tinit", steps // 10, 0),
        options.integer("tfinal", steps * 3 // 10, 0),
        options.integer("deltaT", 1, 1),
        init_r * len(sites),
        target_r * len(sites),
    )
    plan = Plan(
        sites,
        init_r,
        target_r,
        alpha,
        options.number("lora_dropout", 0.0, minimum=0, below=1),
        schedule,
        options.number("beta1", 0.85, above=0, below=1),
        options.number("beta2", 0.85, above=0, below=1),
        options.number("orth_reg_weight", 0.5, minimum=0),
    )
    if schedule.tinit >= schedule.last:
        options.refuse(
            f"tinit: {schedule.tinit} steps before and {schedule.tfinal} after leave none of the "
            f"job's {steps} to cut ranks in; make tinit or tfinal smaller, or train longer"
        )
    options.done()
    return AdaLoraAdapter(setting, plan)


class AdaLoraAdapter:
    """A `TrainedAdapter`."""

    def __init__(self, setting: Setting, plan: Plan) -> None:
        self._setting, self._plan = setting, plan
        self.dropout = plan.dropout
        self.settled = plan.schedule.last
        parameters: dict[str, torch.Tensor] = {}
        shapes = setting.base.config.projection_shapes()
        for site in plan.sites:
            fan_in, fan_out = shapes[site[1]]
            a = _STD * torch.randn(plan.init_r, fan_in, generator=setting.generator)
            b = _STD * torch.randn(fan_out, plan.init_r, generator=setting.generator)
            for name, start in zip(_names(site), (a, b, torch.zeros(plan.init_r, 1)), strict=True):
                parameters[name] = leaf(start, setting.base)
        self.parameters: Mapping[str, torch.Tensor] = parameters
        self._sensitivity = {n: torch.zeros_like(p.detach()) for n, p in parameters.items()}
        self._uncertainty = {n: torch.zeros_like(p.detach()) for n, p in parameters.items()}
        device = setting.base.embed.device
        self._kept = {
            site: torch.ones(plan.init_r, dtype=torch.bool, device=device) for site in plan.sites
        }

    def prepare(self, observe: Observe) -> None:
        """Nothing is chosen from data before the first step."""

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`."""
        return [ParameterGroup(tuple(self.parameters))]

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`."""
        scale = self._plan.alpha / (self._plan.init_r + 1e-5)
        changes = {}
        for site in self._plan.sites:
            a, b, e = self._of(site)
            changes[site] = SiteDelta(a=a * e, b=b.T * scale)
        return AdapterDelta(changes)

    def penalty(self) -> torch.Tensor | None:
        """The mean over all A and B of |A A^T - 1| and |B^T B - 1|, times its weight."""
        if not self._plan.orthogonality:
            return None
        total = torch.stack([_skewness(rows) for rows in self._bases()]).mean()
        return total * self._plan.orthogonality

    def stepped(self, step: int) -> None:
        """Learns from the step's gradients what matters, and cuts what the schedule says."""
        schedule = self._plan.schedule
        with torch.no_grad():
            if step < schedule.last:
                self._watch()
            budget = schedule.budget(step)
            if budget is not None:
                self._cut(budget)
            elif step > schedule.last:
                self._clear()

    def state(self) -> Mapping[str, torch.Tensor]:
        """What is smoothed over steps, and which triplets are left."""
        return {
            **{_SENSITIVITY + name: tensor for name, tensor in self._sensitivity.items()},
            **{_UNCERTAINTY + name: tensor for name, tensor in self._uncertainty.items()},
            **{_KEPT + module_path(*site): tensor for site, tensor in self._kept.items()},
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `TrainedAdapter`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`. Cut triplets are left out, down to none at all in a module."""
        tensors: dict[str, torch.Tensor] = {}
        pattern: dict[str, list[bool]] = {}
        for site in self._plan.sites:
            a, b, e = self._of(site)
            # Between two cuts a triplet may have come back.
            kept = self._kept[site] | (e.detach()[:, 0] != 0)
            found = (a[kept], b[:, kept], e[kept])
            tensors.update(zip(_names(site), map(stored, found), strict=True))
            pattern[f"{module_path(*site)}.lora_E"] = kept.tolist()
        plan, schedule = self._plan, self._plan.schedule
        config = config_of(
            self._setting,
            "ADALORA",
            beta1=plan.beta1,
            beta2=plan.beta2,
            bias="none",
            deltaT=schedule.delta_t,
            fan_in_fan_out=False,
            init_lora_weights=True,
            init_r=plan.init_r,
            lora_alpha=int(plan.alpha) if plan.alpha.is_integer() else plan.alpha,
            lora_dropout=plan.dropout,
            orth_reg_weight=plan.orthogonality,
            rank_pattern=pattern,
            target_modules=[module_path(*site) for site in plan.sites],
            target_r=plan.target_r,
            tfinal=schedule.tfinal,
            tinit=schedule.tinit,
            total_step=schedule.steps,
        )
        return AdapterFiles(config, tensors)

    def _of(self, site: Site) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A module's A [r, in], B [out, r] and E [r, 1]."""
        a, b, e = _names(site)
        return self.parameters[a], self.parameters[b], self.parameters[e]

    def _bases(self) -> Iterator[torch.Tensor]:
        """What should be orthogonal, as rows."""
        for site in self._plan.sites:
            a, b, _ = self._of(site)
            yield from (a, b.T)

    def _watch(self) -> None:
        """Smooths |p * gradient| of every number, and how much that varies (section 3.3)."""
        beta1, beta2 = self._plan.beta1, self._plan.beta2
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            importance = (parameter * parameter.grad).abs()
            mean, spread = self._sensitivity[name], self._uncertainty[name]
            mean.mul_(beta1).add_(importance, alpha=1 - beta1)
            spread.mul_(beta2).add_((importance - mean).abs(), alpha=1 - beta2)

    def _cut(self, budget: int) -> None:
        """Leaves the `budget` most important triplets of all modules together."""
        scores = torch.cat([self._scores(site) for site in self._plan.sites])
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[scores.argsort(stable=True)[: len(scores) - budget]] = False
        parts = torch.split(kept, self._plan.init_r)
        for site, own in zip(self._plan.sites, parts, strict=True):
            self._kept[site].copy_(own)
        self._clear()

    def _scores(self, site: Site) -> torch.Tensor:
        """[r]: E's own importance, and the means of A's row and of B's column."""
        a, b, e = (self._sensitivity[name] * self._uncertainty[name] for name in _names(site))
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def _clear(self) -> None:
        for site, kept in self._kept.items():
            self._of(site)[2].masked_fill_(~kept[:, None], 0.0)


def _skewness(rows: torch.Tensor) -> torch.Tensor:
    """How far the rows are from orthonormal: |P P^T - 1|, Frobenius."""
    unit = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    distance: torch.Tensor = torch.linalg.matrix_norm(rows @ rows.T - unit)
    return distance


def _names(site: Site) -> tuple[str, str, str]:
    """A module's A, B and E as PEFT's files call them."""
    path = PREFIX + module_path(*site)
    return f"{path}.lora_A", f"{path}.lora_B", f"{path}.lora_E"
