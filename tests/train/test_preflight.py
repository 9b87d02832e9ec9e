"""What a server would refuse is known before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_training.methods import METHODS
from loraplex_training.run import plan, preflight
from loraplex_training.run.run import Run
from loraplex_training.spec.spec import RunSpec
from rich.console import Console

from train import runs

OPTIONS: dict[str, dict[str, object]] = {
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
    "fishmask": {"rows": 2, "samples": 1},
}


def spec_of(top: Path, method: str, **options: object) -> RunSpec:
    runs.write_base(top)
    data = runs.write_data(top / runs.DATA)
    job = runs.job("job", data, method=method, steps=8, eval_every=8)
    given = OPTIONS.get(method, {}) | options
    return runs.spec(top, "run", replace(job, method=replace(job.method, options=given)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_before_its_first_step(method: str, tmp_path: Path) -> None:
    assert not any(job.progress.step for job in Run.start(spec_of(tmp_path, method)).jobs)


def refused(spec: RunSpec) -> Refusal:
    with pytest.raises(Refusal) as error:
        Run.start(spec)
    assert not Path(spec.out).exists()
    with pytest.raises(Refusal) as planned:
        plan.plan(spec, Console(quiet=True))
    assert planned.value.message == error.value.message
    assert error.value.reason is Reason.METHOD_INVALID
    return error.value


def test_a_configuration_that_is_too_large_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, "adalora", init_r=24)
    monkeypatch.setattr(preflight, "MAX_CONFIG_BYTES", 2000)
    message = refused(spec).message
    assert "adapter_config.json would have" in message
    assert "choose a lower rank or fewer target modules" in message


def test_the_size_that_is_examined_is_the_largest_that_training_can_lead_to(tmp_path: Path) -> None:
    run = Run.start(spec_of(tmp_path, "adalora", init_r=24))
    (job,) = run.jobs
    first = preflight.json_bytes(job.adapter.files().config)
    run.train()
    last = preflight.json_bytes(job.adapter.files().config)
    assert len(first) < len(last) <= len(first) + first.count(b"true")


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (AdapterLimits(max_weights_bytes=1000), "adapter_model.safetensors would have"),
        (AdapterLimits(max_rank=2), "has rank 4; at most 2 is allowed"),
        (AdapterLimits(max_scale=1e-3), "has scale"),
    ],
)
def test_an_adapter_that_a_server_would_refuse_ends_the_run_before_it_begins(
    limits: AdapterLimits, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path, "lora", r=4)
    monkeypatch.setattr(preflight, "LIMITS", limits)
    assert what in refused(spec).message
