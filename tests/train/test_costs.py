"""The memory that a run's jobs are expected to take follows what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from loraplex_training.run import costs
from loraplex_training.run.inputs import RunInputs
from loraplex_training.spec.spec import JobSpec, RunSpec

from train import runs


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("costs")
    runs.write_base(top)
    runs.write_data(top / runs.DATA)
    return top


def expected(top: Path, *jobs: JobSpec, **changes: object) -> Mapping[str, int]:
    spec: RunSpec = replace(runs.spec(top, "out", *jobs), **changes)  # type: ignore[arg-type]
    inputs = RunInputs.open(spec)
    found = costs.of(inputs.base.weights, inputs.jobs(spec), spec)
    assert found.total == sum(found.items.values())
    return found.items


def test_more_tokens_jobs_and_parameters_take_more(top: Path) -> None:
    data = top / runs.DATA
    one = runs.job("one", data)
    items = expected(top, one)
    wide = expected(top, replace(one, batch_size=8))
    assert wide["activations"] > 2 * items["activations"]
    assert wide["adapters"] == items["adapters"]
    two = expected(top, one, runs.job("two", data))
    assert two["activations"] == 2 * items["activations"]
    assert two["adapters"] == 2 * items["adapters"]
    assert expected(top, runs.job("one", data, options={"r": 8}))["adapters"] > items["adapters"]
    assert expected(top, one, checkpointing=True)["activations"] < items["activations"]


def test_virtual_tokens_count(top: Path) -> None:
    def prompt(count: int) -> JobSpec:
        made = runs.job("p", top / runs.DATA, method="prompt_tuning")
        options = {"num_virtual_tokens": count, "init": "random"}
        return replace(made, method=replace(made.method, options=options))

    few, many = expected(top, prompt(1)), expected(top, prompt(101))
    assert many["activations"] > 3 * few["activations"]


def test_answers_that_take_more_than_training_are_counted(top: Path) -> None:
    small = runs.job("one", top / runs.DATA, batch_size=1)
    many = replace(small, metric="exact", metric_examples=1000)
    assert sum(expected(top, many).values()) > sum(expected(top, small).values())
