"""The adapters of a job as they were evaluated: each whole, as it was then, and the latest kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_training.publish.evaluated import keep_evaluated
from loraplex_training.publish.publish import publish
from loraplex_training.publish.target import Target
from loraplex_training.report.events import Evaluated, Event, Exported, RunStarted, StepDone
from loraplex_training.run.run import Run
from safetensors import safe_open

from train import commands, runs, tiny


def tensors(folder: Path) -> dict[str, bytes]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_evaluated_adapters_are_kept_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(commands.KERNELS))
    runs.write_base(tmp_path)
    job = runs.job("a", runs.write_data(tmp_path / runs.DATA), steps=8, eval_every=2)
    spec = runs.spec(tmp_path, "run", job, keep_evaluated=2)
    then: dict[int, dict[str, bytes]] = {}
    order: list[tuple[type, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, Exported):
            then[event.step] = tensors(event.path)
        if isinstance(event, Exported | Evaluated):
            order.append((type(event), event.step))

    run = Run.start(spec, [runs.Calling(note)])

    def export(one: Any) -> Path:
        made = keep_evaluated(run, one)
        now = runs.written(one)
        now.pop("config")
        assert tensors(made) == now
        return made

    run.train(None, export)
    steps = [2, 4, 6, 8]
    assert list(then) == steps
    assert order[1:] == [(kind, step) for step in steps for kind in (Evaluated, Exported)]
    assert len({tuple(sorted(each.items())) for each in then.values()}) == 4
    kept = sorted(path.name for path in (spec.out / "a").iterdir())
    assert kept == ["step-000006", "step-000008"]
    assert isinstance(tiny.opened_by_us(spec.out / "a" / "step-000008"), AdapterDelta)
    finished = publish(run.jobs[0], run, Target())
    assert tensors(finished.path) == then[run.jobs[0].progress.best_step]


def test_nothing_is_kept_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(commands.KERNELS))
    runs.write_base(tmp_path)
    job = runs.job("a", runs.write_data(tmp_path / runs.DATA), steps=2, eval_every=2)
    seen = runs.Seen()
    run = Run.start(runs.spec(tmp_path, "run", job), [seen])
    run.train()
    assert not seen.of(Exported)
    assert not (run.spec.out / "a").exists()


def test_a_run_that_is_resumed_knows_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(commands.KERNELS))
    runs.write_base(tmp_path)
    job = runs.job("a", runs.write_data(tmp_path / runs.DATA), steps=4, eval_every=2)
    first, second = runs.Seen(), runs.Seen()
    run = Run.start(runs.spec(tmp_path, "run", job), [first])
    stopping = runs.Calling(lambda e: run.stop() if getattr(e, "step", 0) == 2 else None)
    run._observers = [first, stopping]
    run.train()
    Run.resume(run.spec.out, [second]).train()
    done = sum(event.tokens for event in first.of(StepDone))
    assert first.of(RunStarted)[0].tokens == (0,)
    assert second.of(RunStarted)[0].tokens == (done,)
    assert done > 0
