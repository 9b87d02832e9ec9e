"""A job's optimiser and learning rate: torch's and bitsandbytes' AdamW, transformers' schedules.

On a CPU, the 8-bit AdamW of bitsandbytes 0.50 works as on CUDA (uint8 moments in blocks of 256,
tensors of fewer than 4096 elements in float32). Paging moves state between a GPU and the host; on a
CPU bitsandbytes only warns and does not page, so paged optimisers are refused there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loraplex_model.ops.quiet import quieten_bitsandbytes

from loraplex_training.methods.base import ParameterGroup
from loraplex_training.spec.spec import OptimSpec

_BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw8bit": "PagedAdamW8bit",
}
_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
_CODES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""bitsandbytes' 8-bit codes, which are the same for all tensors and therefore not saved."""


@dataclass(frozen=True, slots=True)
class OptimiserState:
    """The state that an optimiser keeps, as found in its tensors.

    Attributes:
        kind: name of the optimiser's class.
        dtypes: number of parameters with moments of each dtype.
        nbytes: size of all tensors.
        paged_bytes: size of those that a GPU may page out.
    """

    kind: str
    dtypes: Mapping[str, int]
    nbytes: int
    paged_bytes: int

    def __str__(self) -> str:
        if not self.dtypes:
            return f"{self.kind}, no state"
        types = " + ".join(
            kind if len(self.dtypes) == 1 else f"{kind} ({count} tensors)"
            for kind, count in sorted(self.dtypes.items())
        )
        paged = f", {self.paged_bytes / 1e6:.1f} MB of it paged" if self.paged_bytes else ""
        return f"{self.kind}, {types}, {self.nbytes / 1e6:.1f} MB{paged}"


def problem_of(spec: OptimSpec, device: torch.device) -> str:
    """Returns a sentence on why the optimiser cannot run on the device, or "" if it can."""
    if spec.name.startswith("paged") and device.type != "cuda":
        other = "adamw8bit" if spec.name.endswith("8bit") else "adamw"
        return (
            f"optimiser {spec.name} pages its state between a GPU and the host, and this run is on "
            f"the {device.type}; use {other}, which computes the same"
        )
    return ""


class JobOptimiser:
    """Updates one job's parameters. A step consists of `norm`, `clip`, `step` and `clear`."""

    def __init__(
        self,
        spec: OptimSpec,
        parameters: Mapping[str, torch.Tensor],
        groups: Sequence[ParameterGroup],
        steps: int,
    ) -> None:
        """`steps` is the job's total, for the schedule. `groups` name every parameter once."""
        named = [name for group in groups for name in group.names]
        assert sorted(named) == sorted(parameters), "the groups name every parameter once"
        self._spec = spec
        self._parameters = dict(parameters)
        self._rates = [group.rate for group in groups]
        self._optimiser = _optimiser(
            spec,
            [
                {
                    "params": [parameters[name] for name in group.names],
                    "lr": spec.lr * group.rate,
                    "weight_decay": spec.weight_decay if group.decay else 0.0,
                }
                for group in groups
                if group.names
            ],
        )
        self._schedule = _schedule(spec, self._optimiser, steps)

    @property
    def rate(self) -> float:
        """Learning rate of the next step, for a group with factor 1."""
        return float(self._optimiser.param_groups[0]["lr"]) / self._rates[0]

    def norm(self) -> float:
        """Returns the 2-norm of all gradients together."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def clip(self, norm: float) -> None:
        """Scales the gradients to the job's limit if `norm`, their norm, exceeds it."""
        if 0 < self._spec.clip < norm:
            limit, found = self._spec.clip, torch.tensor(norm)
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), limit, found)

    def step(self) -> None:
        """Updates the parameters, then the schedule."""
        self._optimiser.step()
        if self._spec.schedule not in _BY_LOSS:
            self._schedule.step()

    def evaluated(self, loss: float) -> None:
        """Updates schedules that depend on the evaluation loss (plateau, greedy)."""
        if self._spec.schedule in _BY_LOSS:
            self._schedule.step(loss)

    def clear(self) -> None:
        """Frees the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def describe(self) -> OptimiserState:
        """Returns the actual state, from its tensors; it is empty before the first step."""
        dtypes: Counter[str] = Counter()
        storage: dict[int, torch.Tensor] = {}
        for state in self._optimiser.state.values():
            tensors = {key: v for key, v in state.items() if isinstance(v, torch.Tensor)}
            storage |= {tensor.data_ptr(): tensor for tensor in tensors.values()}
            kinds = {t.dtype for key, t in tensors.items() if key in _MOMENTS}
            dtypes.update(str(kind).removeprefix("torch.") for kind in kinds)
        return OptimiserState(
            type(self._optimiser).__name__,
            dict(dtypes),
            sum(tensor.nbytes for tensor in storage.values()),
            sum(t.nbytes for t in storage.values() if getattr(t, "is_paged", False)),
        )

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns JSON values and named tensors that `restore` resumes from bit for bit."""
        numbers: dict[str, dict[str, Any]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    if key not in _CODES:
                        tensors[f"{name}/{key}"] = value.detach()
                else:
                    numbers.setdefault(name, {})[key] = value
        rates = [group["lr"] for group in self._optimiser.param_groups]
        schedule = self._schedule.state_dict()
        schedule.pop("_get_lr_called_within_step", None)
        return {"numbers": numbers, "rates": rates, "schedule": schedule}, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` returned."""
        for name, parameter in self._parameters.items():
            state: dict[str, Any] = dict(values["numbers"].get(name, {}))
            for full, value in tensors.items():
                owner, _, key = full.rpartition("/")
                if owner == name:
                    state[key] = self._placed(parameter, value)
            codes: Mapping[str, torch.Tensor] = getattr(self._optimiser, "name2qmap", {})
            for key, code in _CODES.items():
                if state.get(key.replace("qmap", "state"), parameter).dtype == torch.uint8:
                    state[key] = codes[code].to(parameter.device)
            if state:
                self._optimiser.state[parameter] = state
        self._schedule.load_state_dict(dict(values["schedule"]))
        for group, rate in zip(self._optimiser.param_groups, values["rates"], strict=True):
            group["lr"] = rate

    def _placed(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Copies a tensor to where the optimiser keeps it: paged, on the device or on the host."""
        if isinstance(self._optimiser, torch.optim.AdamW) or value.shape != parameter.shape:
            return value.to(parameter.device, copy=True)
        buffer: torch.Tensor = self._optimiser.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
        return buffer.copy_(value)


def expected(
    spec: OptimSpec, parameters: Mapping[str, torch.Tensor], groups: Sequence[ParameterGroup]
) -> OptimiserState:
    """Returns the state that the optimiser will have, from a step on zeros of equal shapes."""
    zeros = {name: torch.zeros_like(p, requires_grad=True) for name, p in parameters.items()}
    for zero in zeros.values():
        zero.grad = torch.zeros_like(zero)
    trial = JobOptimiser(spec, zeros, groups, 1)
    trial.step()
    return trial.describe()


def _optimiser(spec: OptimSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr)
    if spec.name == "adamw":
        # One native call for all tensors instead of several for each.
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
    quieten_bitsandbytes()
    import bitsandbytes  # takes seconds, so only if needed

    kind = getattr(bitsandbytes.optim, _BITSANDBYTES[spec.name])
    optimiser: torch.optim.Optimizer = kind(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
    return optimiser


def _schedule(spec: OptimSpec, optimiser: torch.optim.Optimizer, steps: int) -> Any:
    quieten_bitsandbytes()
    from transformers import get_scheduler  # takes seconds; imports bitsandbytes

    name, rising = spec.schedule, int(spec.warmup * steps)
    if name == "constant" and rising:
        name = "constant_with_warmup"
    return get_scheduler(name, optimiser, rising, steps, _needs(name, spec, optimiser, steps))


def _needs(
    name: str, spec: OptimSpec, optimiser: torch.optim.Optimizer, steps: int
) -> dict[str, Any] | None:
    """Returns the extra arguments of some schedules; all others have transformers' defaults."""
    rates = [group["lr"] for group in optimiser.param_groups]
    needs: Mapping[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": max(1, steps // 5)},
        "polynomial": {"lr_end": min(1e-7, spec.lr / 10)},
        "greedy": {"min_lr": [r / 100 for r in rates], "max_lr": [r * 10 for r in rates]},
    }
    return needs.get(name)
