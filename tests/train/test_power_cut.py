"""A run, and what it publishes, after a loss of power."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loraplex_adapters.convert.export.directory import staged, write_json
from loraplex_model.base.refusal import Refusal
from loraplex_training.publish.target import Target, keep, kept
from loraplex_training.report.events import RunStarted, Saved
from loraplex_training.report.record import RunRecord
from loraplex_training.run.checkpoint import RunFolder, RunSnapshot, is_run
from loraplex_training.run.inputs import RunInputs
from loraplex_training.run.run import Run
from power.recorder import Recorder
from power.replay import replay

from train import runs

power_cut = pytest.mark.fault("power-cut")

SAVES = 4


def snapshot(step: int) -> RunSnapshot:
    """State of two jobs in which every value is the number of its step."""
    tensors = {job: {"w": torch.full((40, 7), float(step))} for job in ("a", "b")}
    return RunSnapshot({"step": step, "history": [step] * 50}, tensors)


def check_folder(out: Path, acknowledged: frozenset[str]) -> None:
    saved = max((int(step.split()[1]) for step in acknowledged if " " in step), default=0)
    assert is_run(out) or "configured" not in acknowledged
    if is_run(out):
        assert (out / "config.toml").read_text() == "steps = 4\n" * 20
    folder = RunFolder(out, keep=2)
    try:
        found = folder.newest()
        step = 0 if found is None else found.values["step"]
        assert step in (saved, saved + 1)
        if found is not None:
            expected = snapshot(step)
            assert found.values == expected.values
            for job, tensors in expected.tensors.items():
                assert torch.equal(found.tensors[job]["w"], tensors["w"])
        folder.save(snapshot(9))  # the run goes on, whatever was left
        again = folder.newest()
        assert again is not None
        assert again.values["step"] == 9
        assert not list((out / "checkpoints").glob(".new-*"))
    finally:
        folder.close()


@power_cut
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("at_most", [80, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_checkpoint_that_was_saved_is_there(at_most: int, keep: int, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with recorder.recording():
        folder = RunFolder(tmp_path / "runs" / "one", keep=keep)
        folder.write_config("steps = 4\n" * 20)
        recorder.acknowledge("configured")
        for step in range(1, SAVES + 1):
            folder.save(snapshot(step))
            recorder.acknowledge(f"saved {step}")
        folder.close()
    replay(
        recorder.moments,
        lambda left, acknowledged: check_folder(left / "runs" / "one", acknowledged),
        at_most=at_most,
    )


@power_cut
def test_a_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Events, curves and other files that are not flushed are in the run's directory too."""
    runs.write_base(tmp_path)
    job = runs.job("a", runs.write_data(tmp_path / runs.DATA), steps=4)
    disk = tmp_path / "disk"
    disk.mkdir()
    spec = replace(runs.spec(tmp_path, "whole", job, save_every=2), out=disk / "out")
    inputs = RunInputs.open(spec)
    recorder = Recorder(disk)

    def acknowledge(event: object) -> None:
        if isinstance(event, Saved):
            recorder.acknowledge(f"saved {event.step}")

    with recorder.recording():
        run = Run.start(spec, [RunRecord(spec.out), runs.Calling(acknowledge)], inputs)
        expected = runs.written(run.train()["a"])

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        saved = max((int(step.split()[1]) for step in acknowledged), default=-1)
        if not is_run(left / "out"):
            assert saved < 0
            return
        seen = runs.Seen()
        resumed = Run.resume(left / "out", [RunRecord(left / "out"), seen], inputs)
        assert runs.written(resumed.train()["a"]) == expected
        assert seen.of(RunStarted)[0].step >= max(saved, 0)

    replay(recorder.moments, check, at_most=16)


@power_cut
def test_an_adapter_that_was_published_is_there(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    out = Path("run") / "job" / "adapter"

    def publish(number: int) -> None:
        with staged(tmp_path / out, force=True) as fresh:
            fresh.mkdir()
            write_json(fresh / "adapter_config.json", {"number": number})
            (fresh / "adapter_model.safetensors").write_bytes(bytes([number]) * 5000)
        recorder.acknowledge(str(number))

    with recorder.recording():
        publish(1)
        publish(2)

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        number = max(map(int, acknowledged), default=0)
        parent = (left / out).parent
        aside = list(parent.glob(".adapter.*.old")) if parent.is_dir() else []
        whole = [place for place in [left / out, *aside] if place.is_dir()]
        for place in [left / out] if (left / out).is_dir() else whole[: number == 1]:
            content = (place / "adapter_model.safetensors").read_bytes()
            assert content in [bytes([n]) * 5000 for n in (number, number + 1)]
        assert whole or number == 0
        assert (left / out).is_dir() or number != 2

    replay(recorder.moments, check)


@power_cut
def test_a_resumed_run_publishes_to_its_target(tmp_path: Path) -> None:
    target = Target(store=Path("/adapters"), alias="best", labels={"a": "b"})
    recorder = Recorder(tmp_path)
    with recorder.recording():
        keep(target, tmp_path)
        recorder.acknowledge("kept")

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        assert kept(left) in ((target,) if acknowledged else (target, Target()))

    replay(recorder.moments, check)


def test_a_run_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Refusal, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run")
