"""A run goes on from whatever moment it ended at, to the same bytes, or says why it cannot."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base import faults
from loraplex_model.base.refusal import Refusal
from loraplex_training.report.events import JobEnded, RunStarted, StepDone
from loraplex_training.run import checkpoint
from loraplex_training.run.checkpoint import CONFIG, FOLDER
from loraplex_training.run.inputs import RunInputs
from loraplex_training.run.run import Run
from loraplex_training.spec.spec import RunSpec

from model import tiny
from train import runs, train_kills

KILLS = Path(train_kills.__file__)


def points() -> list[str]:
    """The fault points of a run's folder, once for each place."""
    tree = ast.parse(Path(checkpoint.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.literal_eval(c.args[0]) for c in calls if ast.unparse(c.func) == "reach"]


POINTS = sorted(set(points()))
DONE = "train.checkpoint.done"
"""It stands after the last thing that a disk does."""
SAVING = [point for point in POINTS if point.startswith("train.checkpoint") and point != DONE]
STARTING = [point for point in POINTS if not point.startswith("train.checkpoint")]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("resume")
    runs.write_base(top)
    runs.write_data(top / runs.DATA)
    return top


def three(top: Path) -> RunSpec:
    """One job of four steps, saved after each second one."""
    job = runs.job("a", top / runs.DATA, steps=4, options={"lora_dropout": 0.2})
    return runs.spec(top, "out", job, save_every=2)


@pytest.fixture(scope="module")
def inputs(top: Path) -> RunInputs:
    return RunInputs.open(three(top))


Bytes = Mapping[str, bytes]


@pytest.fixture(scope="module")
def whole(top: Path, inputs: RunInputs) -> Bytes:
    """What the job becomes uninterrupted."""
    spec = replace(three(top), out=top / "whole")
    return runs.written(runs.train(spec, inputs=inputs)["a"])


@pytest.fixture
def spec(top: Path, tmp_path: Path) -> RunSpec:
    return replace(three(top), out=tmp_path / "out")


@pytest.fixture
def stopped(spec: RunSpec, inputs: RunInputs) -> RunSpec:
    """A run that was stopped after its third step; checkpoints of steps 2 and 3 are there."""
    stop_after(3, spec, inputs)
    return spec


def stop_after(step: int, spec: RunSpec, inputs: RunInputs) -> None:
    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == step:
            run.stop()

    run = Run.start(spec, [runs.Calling(stop)], inputs)
    run.train()


def finish(out: Path, inputs: RunInputs | None = None) -> Bytes:
    return runs.written(Run.resume(out, inputs=inputs).train()["a"])


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / FOLDER).iterdir())


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_anywhere_leaves_a_run_that_ends_with_the_same_bytes(
    wanted: int, tmp_path: Path
) -> None:
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    folder = parent / f"kills-{os.getpid()}-{wanted}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(
            [sys.executable, str(KILLS), str(folder), str(wanted)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ran.returncode == 0, ran.stderr
        outcome = json.loads(ran.stdout.splitlines()[-1])
        assert outcome["kills"] == wanted
        assert outcome["same_bytes"]
        # the last one killed is finished in this process, which shares nothing with the other
        seen = runs.Seen()
        run = Run.resume(Path(outcome["left"]), [seen])
        assert train_kills.digests(run.train()) == outcome["expected"], outcome["seed"]
        assert seen.of(RunStarted)[0].step > 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_every_point_is_reached(spec: RunSpec, inputs: RunInputs) -> None:
    assert len(POINTS) == len(points())
    seen: set[str] = set()
    with faults.injected(seen.add):
        runs.train(replace(spec, keep=1), inputs=inputs)
    assert {point for point in seen if point.startswith("train.")} >= set(POINTS)


@pytest.mark.parametrize("point", SAVING)
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(
    point: str, spec: RunSpec, inputs: RunInputs, whole: Bytes
) -> None:
    spec = replace(spec, keep=1)
    saves = 0

    def full(reached: str) -> None:
        nonlocal saves
        saves += reached == "train.checkpoint.make"
        if reached == point and saves == 2:  # of step 2; that of step 0 is there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run.start(spec, inputs=inputs)
    with faults.injected(full), pytest.raises(Refusal) as caught:
        run.train()
    assert caught.value.reason == "DISK_FULL"
    assert "make room" in str(caught.value)
    names = [path.name for path in checkpoints(spec.out)]
    after = point in ("train.checkpoint.flush", "train.checkpoint.prune")
    assert names == (["000001", "000002"] if after else ["000001"])
    assert finish(spec.out, inputs) == whole


@pytest.mark.parametrize("point", STARTING)
def test_a_disk_that_is_full_at_the_start_is_told_too(
    point: str, spec: RunSpec, inputs: RunInputs
) -> None:
    def full(reached: str) -> None:
        if reached == point:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with faults.injected(full), pytest.raises(Refusal) as caught:
        Run.start(spec, inputs=inputs)
    assert caught.value.reason == "DISK_FULL"
    Run.start(spec, inputs=inputs)


def test_a_folder_that_cannot_be_written_is_told(spec: RunSpec, inputs: RunInputs) -> None:
    spec.out.parent.mkdir(exist_ok=True)
    spec.out.write_text("a file")
    with pytest.raises(Refusal, match="cannot be written") as caught:
        Run.start(spec, inputs=inputs)
    assert caught.value.reason == "CONFIG_INVALID"


def flip(place: Path) -> None:
    path = place / "a.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def cut(place: Path) -> None:
    os.truncate(place / "a.safetensors", 100)


def forget(place: Path) -> None:
    (place / "SHA256SUMS").unlink()


def rewrite(place: Path) -> None:
    path = place / "state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))


@pytest.mark.parametrize("damage", [flip, cut, forget, rewrite])
def test_a_damaged_checkpoint_is_passed_over_and_told(
    damage: Callable[[Path], None], stopped: RunSpec, inputs: RunInputs, whole: Bytes
) -> None:
    newest = checkpoints(stopped.out)[-1]
    damage(newest)
    seen = runs.Seen()
    run = Run.resume(stopped.out, [seen], inputs)
    (notice,) = run.notices
    assert str(newest) in notice
    assert "damaged" in notice
    assert runs.written(run.train()["a"]) == whole
    assert [e.step for e in seen.of(StepDone)] == [3, 4]
    assert newest not in checkpoints(stopped.out), "it takes no sound one's place"
    flip(checkpoints(stopped.out)[-1])
    assert finish(stopped.out, inputs) == whole


@pytest.mark.fault("shortage-taken-for-damage")
def test_a_shortage_of_descriptors_is_no_damage_of_a_checkpoint(
    stopped: RunSpec, inputs: RunInputs, whole: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, newest = checkpoints(stopped.out), checkpoints(stopped.out)[-1]
    real = Path.read_text

    def read_text(self: Path, *args: Any, **options: Any) -> str:
        if self.parent == newest:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        with pytest.raises(Refusal, match="cannot be read now") as caught:
            Run.resume(stopped.out, inputs=inputs)
    assert caught.value.reason == "CONFIG_INVALID"
    assert checkpoints(stopped.out) == kept
    assert finish(stopped.out, inputs) == whole


def test_if_all_are_damaged_it_says_so(stopped: RunSpec, inputs: RunInputs) -> None:
    for place in checkpoints(stopped.out):
        flip(place)
    with pytest.raises(Refusal) as caught:
        Run.resume(stopped.out, inputs=inputs)
    assert caught.value.reason == "CHECKPOINT_INVALID"
    assert len(caught.value.messages) == 3


def test_what_a_crash_left_half_written_goes(
    stopped: RunSpec, inputs: RunInputs, whole: Bytes
) -> None:
    left = stopped.out / FOLDER / ".new-000009"
    left.mkdir()
    (left / "a.safetensors").write_bytes(b"half")
    assert finish(stopped.out, inputs) == whole
    assert not left.exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_were_asked_for(spec: RunSpec, inputs: RunInputs, keep: int) -> None:
    runs.train(replace(spec, keep=keep, save_every=1), inputs=inputs)
    assert [p.name for p in checkpoints(spec.out)] == ["000003", "000004", "000005"][-keep:]


def test_before_the_first_checkpoint_it_begins_anew(
    spec: RunSpec, inputs: RunInputs, whole: Bytes
) -> None:
    run = Run.start(spec, inputs=inputs)
    run.stop()
    run.train()
    assert checkpoints(spec.out) == []
    assert finish(spec.out, inputs) == whole


def test_a_finished_run_has_its_outcomes_at_once(
    spec: RunSpec, inputs: RunInputs, whole: Bytes
) -> None:
    first = runs.train(spec, inputs=inputs)["a"]
    seen = runs.Seen()
    again = Run.resume(spec.out, [seen], inputs).train()["a"]
    assert runs.written(again) == runs.written(first) == whole
    assert again.progress == first.progress
    assert seen.of(StepDone) == seen.of(JobEnded) == []
    assert len(checkpoints(spec.out)) == 2


def test_a_folder_may_be_moved(stopped: RunSpec, inputs: RunInputs, whole: Bytes) -> None:
    moved = stopped.out.rename(stopped.out.with_name("moved"))
    assert finish(moved, inputs) == whole
    assert not stopped.out.exists()


def refused(out: Path, reason: str) -> str:
    before = sorted((p, p.stat().st_mtime_ns) for p in (out / FOLDER).rglob("*"))
    with pytest.raises(Refusal) as caught:
        Run.resume(out)
    assert caught.value.reason == reason
    assert sorted((p, p.stat().st_mtime_ns) for p in (out / FOLDER).rglob("*")) == before
    return str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert CONFIG in refused(tmp_path, "CHECKPOINT_INVALID")
    refused(tmp_path / "none", "CHECKPOINT_INVALID")
    assert not (tmp_path / "none").exists()


def test_a_run_of_another_format_is_refused(
    stopped: RunSpec, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_training.run.run._FORMAT", 2)
    assert "format 1" in refused(stopped.out, "CHECKPOINT_INVALID")


@pytest.fixture
def own(tmp_path: Path) -> RunSpec:
    """A stopped run whose base and data are its own, to be changed."""
    runs.write_base(tmp_path)
    runs.write_data(tmp_path / runs.DATA)
    runs.write_data(tmp_path / "eval.jsonl", 4, seed=9)
    spec = three(tmp_path)
    (job,) = spec.jobs
    job = replace(job, data=replace(job.data, eval_path=tmp_path / "eval.jsonl"))
    spec = replace(spec, jobs=(job,))
    stop_after(3, spec, RunInputs.open(spec))
    return spec


def test_another_base_or_other_data_are_refused(own: RunSpec, tmp_path: Path) -> None:
    data, other = tmp_path / runs.DATA, tmp_path / "eval.jsonl"
    kept = data.read_bytes(), other.read_bytes()
    for path, content in zip((data, other), kept, strict=True):
        path.write_bytes(content + content.splitlines(keepends=True)[0])
        said = refused(own.out, "DATA_INVALID")
        assert str(path) in said
        assert "has changed" in said
        path.write_bytes(content)
    tokenizer = tmp_path / runs.MODEL / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"~": 97', '"~": 99'))
    assert "tokenizer" in refused(own.out, "DATA_INVALID")
    tokenizer.write_text(text)
    tiny.write("llama", tmp_path / runs.MODEL, seed=1)
    assert "fingerprint" in refused(own.out, "BASE_MISMATCH")
    tiny.write("llama", tmp_path / runs.MODEL, seed=0)
    Run.resume(own.out)


def test_a_run_on_several_files_resumes_with_the_same_ones(tmp_path: Path) -> None:
    runs.write_base(tmp_path)
    first = runs.write_data(tmp_path / runs.DATA)
    second = tmp_path / "b.csv"
    second.write_text("question,completion\n" + "".join(f"q{i},a\n" for i in range(8)))
    spec = three(tmp_path)
    (job,) = spec.jobs
    data = replace(
        job.data, path=(first, second), weights=(1.0, 2.0), columns={"prompt": "question"}
    )
    spec = replace(spec, jobs=(replace(job, data=data),))
    stop_after(3, spec, RunInputs.open(spec))
    content = second.read_bytes()
    second.write_bytes(content + b"r,s\n")
    said = refused(spec.out, "DATA_INVALID")
    assert f"{first} or {second} has changed" in said
    second.write_bytes(content)
    resumed = Run.resume(spec.out)
    assert resumed.spec.jobs[0].data == data
