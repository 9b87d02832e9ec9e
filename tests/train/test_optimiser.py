"""Optimisers are torch's and bitsandbytes'; what is said of their state is what they keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import bitsandbytes
import pytest
import torch
from loraplex_training.methods.base import ParameterGroup
from loraplex_training.spec.spec import OptimSpec, ScheduleName
from loraplex_training.step.optimiser import JobOptimiser, expected, problem_of
from transformers import get_scheduler

SHAPES = {"small": (8, 16), "large": (64, 96), "vector": (5,)}
STEPS = 20
PLAIN = OptimSpec(lr=1e-2, schedule="constant", warmup=0.0)
GROUPS = [
    ParameterGroup(("large", "vector")),
    ParameterGroup(("small",), rate=16.0, decay=False),
]


def leaves(seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=chance).requires_grad_() for n, s in SHAPES.items()}


def give_gradients(parameters: Mapping[str, torch.Tensor], step: int) -> None:
    chance = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype)


def run(optimiser: JobOptimiser, parameters: Mapping[str, torch.Tensor], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimiser.clip(optimiser.norm())
        optimiser.step()
        optimiser.clear()


def close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    for name in SHAPES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_with_rates_and_decay_by_group(decay: float) -> None:
    ours, theirs = leaves(), leaves()
    spec = replace(PLAIN, weight_decay=decay, betas=(0.8, 0.95), eps=1e-6, clip=0.0)
    run(JobOptimiser(spec, ours, GROUPS, STEPS), ours, range(5))
    other = torch.optim.AdamW(
        [
            {"params": [theirs["large"], theirs["vector"]], "lr": 1e-2, "weight_decay": decay},
            {"params": [theirs["small"]], "lr": 0.16, "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
        eps=1e-6,
        foreach=False,
    )
    for step in range(5):
        give_gradients(theirs, step)
        other.step()
    close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw8bit", bitsandbytes.optim.AdamW8bit), ("sgd", torch.optim.SGD)],
)
def test_the_others_are_what_their_names_say(name: str, kind: Any) -> None:
    ours, theirs = leaves(), leaves()
    spec = replace(PLAIN, name=name, clip=0.0)
    run(JobOptimiser(spec, ours, [ParameterGroup(tuple(SHAPES))], STEPS), ours, range(5))
    other = kind(list(theirs.values()), lr=1e-2)
    for group in other.param_groups:
        group["weight_decay"] = 0.0
    for step in range(5):
        give_gradients(theirs, step)
        other.step()
    close(ours, theirs)


def test_what_is_8_bit_is_read_off_the_state() -> None:
    """bitsandbytes keeps tensors under 4096 numbers in 32 bits, whatever the optimiser's name."""
    parameters = leaves()
    spec = replace(PLAIN, name="adamw8bit")
    optimiser = JobOptimiser(spec, parameters, GROUPS, STEPS)
    assert optimiser.describe().dtypes == {}
    run(optimiser, parameters, range(1))
    state = optimiser.describe()
    assert state.dtypes == {"uint8": 1, "float32": 2}
    # two bytes a number, blocks of 256 with a float32 each for both moments, two codes of 256
    large = 2 * 64 * 96 + 2 * 4 * 24 + 2 * 4 * 256
    assert state.nbytes == large + 2 * 4 * (8 * 16 + 5)
    assert state.paged_bytes == 0
    assert str(state) == "AdamW8bit, float32 (2 tensors) + uint8 (1 tensors), 0.0 MB"


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
def test_what_is_expected_before_the_first_step_is_what_comes(name: str) -> None:
    parameters = leaves()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    spec = replace(PLAIN, name=name, weight_decay=0.1)
    found = expected(spec, parameters, GROUPS)
    assert all(torch.equal(parameters[n], before[n]) for n in before)
    assert all(p.grad is None for p in parameters.values())
    optimiser = JobOptimiser(spec, parameters, GROUPS, STEPS)
    run(optimiser, parameters, range(1))
    assert found == optimiser.describe()
    assert bool(found.dtypes) == (name != "sgd")


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paging_on_a_cpu_is_refused_with_what_can_be_taken(name: str) -> None:
    problem = problem_of(replace(PLAIN, name=name), torch.device("cpu"))
    assert "use adamw" in problem
    assert problem_of(replace(PLAIN, name=name), torch.device("cuda")) == ""
    assert problem_of(PLAIN, torch.device("cpu")) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_on_a_gpu_large_state_is_paged_and_said_to_be(name: str) -> None:
    big = {"big": torch.zeros(1024, 256, device="cuda", requires_grad=True)}
    groups = [ParameterGroup(("big",))]
    spec = replace(PLAIN, name=name)
    optimiser = JobOptimiser(spec, big, groups, STEPS)
    big["big"].grad = torch.ones_like(big["big"])
    optimiser.step()
    state = optimiser.describe()
    assert state.paged_bytes == 2 * 1024 * 256 * (1 if name.endswith("8bit") else 4)
    again = {"big": big["big"].detach().clone().requires_grad_()}
    other = JobOptimiser(spec, again, groups, STEPS)
    other.restore(*optimiser.state())
    for parameters, one in ((big, optimiser), (again, other)):
        parameters["big"].grad = torch.ones_like(parameters["big"])
        one.step()
    assert other.describe() == optimiser.describe()
    assert torch.equal(big["big"], again["big"])


NEEDS: Mapping[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


@pytest.mark.parametrize(
    "name", [n for n in get_args(ScheduleName) if n not in ("reduce_lr_on_plateau", "greedy")]
)
def test_rates_are_transformers_for_every_schedule(name: str) -> None:
    parameters, leaf = leaves(), torch.zeros(1, requires_grad=True)
    other = torch.optim.AdamW([leaf], lr=1e-2)
    called = "constant_with_warmup" if name == "constant" else name  # warmup is honoured
    theirs = get_scheduler(called, other, 5, STEPS, NEEDS.get(name))
    ours = JobOptimiser(replace(PLAIN, schedule=name, warmup=0.25), parameters, GROUPS, STEPS)
    rates = []
    for step in range(STEPS):
        assert ours.rate == pytest.approx(other.param_groups[0]["lr"], rel=1e-12)
        rates.append(ours.rate)
        run(ours, parameters, range(step, step + 1))
        other.step()
        theirs.step()
    assert rates[0] < rates[4] <= max(rates)


@pytest.mark.parametrize(("name", "calls"), [("reduce_lr_on_plateau", 12), ("greedy", 12)])
def test_schedules_by_loss_move_with_evaluations_alone(name: str, calls: int) -> None:
    parameters = leaves()
    ours = JobOptimiser(replace(PLAIN, schedule=name), parameters, GROUPS, STEPS)
    run(ours, parameters, range(3))
    assert ours.rate == pytest.approx(1e-2)
    for _ in range(calls):
        ours.evaluated(1.0)
    assert ours.rate < 1e-2


def test_the_rate_of_a_step_does_not_depend_on_the_evaluations_of_other_schedules() -> None:
    ours = JobOptimiser(replace(PLAIN, schedule="linear"), leaves(), GROUPS, STEPS)
    ours.evaluated(1.0)
    assert ours.rate == pytest.approx(1e-2)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clipping_is_torchs_over_all_of_a_jobs_gradients(limit: float) -> None:
    ours, theirs = leaves(), leaves()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    optimiser = JobOptimiser(replace(PLAIN, clip=limit), ours, GROUPS, STEPS)
    norm = optimiser.norm()
    optimiser.clip(norm)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.values(), limit or float("inf"))
    assert norm == pytest.approx(float(wanted))
    for name in SHAPES:
        assert ours[name].grad is not None
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "reduce_lr_on_plateau", "greedy"])
def test_it_goes_on_from_its_state_to_the_bit(name: str, schedule: str) -> None:
    spec = replace(PLAIN, name=name, schedule=schedule, weight_decay=0.01)
    whole, first = leaves(), leaves()
    straight = JobOptimiser(spec, whole, GROUPS, STEPS)
    broken = JobOptimiser(spec, first, GROUPS, STEPS)
    for optimiser, parameters in ((straight, whole), (broken, first)):
        for loss in (1.0, 0.5, 0.7):
            optimiser.evaluated(loss)
        run(optimiser, parameters, range(4))
    numbers, tensors = broken.state()
    numbers = json.loads(json.dumps(numbers))
    tensors = {n: t.clone() for n, t in tensors.items()}
    second = {n: p.detach().clone().requires_grad_() for n, p in first.items()}
    resumed = JobOptimiser(spec, second, GROUPS, STEPS)
    resumed.restore(numbers, tensors)
    for optimiser, parameters in ((straight, whole), (resumed, second)):
        run(optimiser, parameters, range(4, 9))
        for loss in [0.9] * 12:
            optimiser.evaluated(loss)
        run(optimiser, parameters, range(9, 11))
    assert straight.rate == resumed.rate
    assert straight.describe() == resumed.describe()
    assert all(torch.equal(whole[n], second[n]) for n in SHAPES)
    assert not torch.equal(whole["large"], first["large"])


def test_state_is_of_the_parameters_type() -> None:
    parameters = {"a": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
    optimiser = JobOptimiser(PLAIN, parameters, [ParameterGroup(("a",))], STEPS)
    give_gradients(parameters, 0)
    optimiser.step()
    assert optimiser.describe().dtypes == {"float64": 1}
