"""Ends a training process with SIGKILL again and again, resumes it, and compares the final bytes.

    python tests/train/train_kills.py FOLDER KILLS

FOLDER must not exist. Two jobs (LoRA with dropout and an 8-bit optimiser; AdaLoRA) train in a
process of their own, in float32 on one thread. It is killed at random moments and at fault points,
resumed each time, and what it ends with must be, byte for byte, what an uninterrupted run ends
with. The last kill leaves a run for another process to finish. The last line of output is one JSON
object: `left` is that run's folder, `expected` the SHA-256 of what each of its jobs must become.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from loraplex_model.base import faults
from loraplex_training.report.events import StepDone
from loraplex_training.run.checkpoint import FOLDER, is_run
from loraplex_training.run.inputs import RunInputs
from loraplex_training.run.run import Run
from loraplex_training.spec.spec import MethodSpec, RunSpec
from loraplex_training.step.job import Job

from train import runs

STEPS = 14


def prepare(top: Path) -> RunSpec:
    """Writes base and data; the run that is killed is this one."""
    runs.write_base(top)
    runs.write_data(top / runs.DATA)
    budget = {"target_r": 2, "init_r": 4, "tinit": 4, "tfinal": 6, "deltaT": 2}
    jobs = (
        runs.job(
            "plain",
            top / runs.DATA,
            steps=STEPS,
            options={"r": 32, "target_modules": "all-linear", "lora_dropout": 0.1},
            optim={"name": "adamw8bit"},
        ),
        replace(
            runs.job("adaptive", top / runs.DATA, steps=STEPS - 3, accumulation=2, seed=3),
            method=MethodSpec("adalora", budget),
        ),
    )
    return runs.spec(top, "whole", *jobs, save_every=2)


def digests(outcomes: Mapping[str, Job]) -> dict[str, str]:
    """SHA-256 of what each job would save."""
    found = {}
    for name, outcome in outcomes.items():
        digest = hashlib.sha256()
        for key, content in sorted(runs.written(outcome).items()):
            digest.update(key.encode() + content)
        found[name] = digest.hexdigest()
    return found


def reached(spec: RunSpec, inputs: RunInputs) -> tuple[dict[str, str], list[str]]:
    """The uninterrupted run: what it ends with, and every fault point on its way."""
    points: list[str] = []
    with faults.injected(points.append):
        outcomes = runs.train(spec, inputs=inputs)
    return digests(outcomes), points


def live(spec: RunSpec, report: Path, dies: Callable[[str], None]) -> None:
    """What the child does: begins or goes on, and writes down what it ends with.

    `dies` is called with every fault point and after every step; it may kill the process.
    """
    observer = runs.Calling(lambda e: dies("step") if isinstance(e, StepDone) else None)
    with faults.injected(dies):
        begun = is_run(spec.out)
        run = Run.resume(spec.out, [observer]) if begun else Run.start(spec, [observer])
        outcomes = run.train()
    report.write_text(json.dumps(digests(outcomes)))


def killer(wanted: str, number: int) -> Callable[[str], None]:
    """Kills the process when it comes to a point for the `number`-th time."""
    hits = 0

    def dies(point: str) -> None:
        nonlocal hits
        hits += point == wanted
        if point == wanted and hits == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return dies


def child(spec: RunSpec, report: Path, dies: Callable[[str], None]) -> int:
    """The process id of one that lives."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live(spec, report, dies)
            code = 0
        finally:
            os._exit(code)
    return pid


def kill(spec: RunSpec, report: Path, choice: random.Random, points: list[str]) -> str:
    """Kills a child somewhere; says where, or "" if it came to its end before."""
    if choice.random() < 0.5:
        point, number = choice.choice([*sorted(set(points)), "step"]), choice.randint(1, 3)
        where = f"{point}, time {number}"
        pid = child(spec, report, killer(point, number))
    else:
        delay = choice.uniform(0.05, 1.5)
        where = f"after {delay:.3f} s"
        pid = child(spec, report, lambda point: None)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return where
    assert os.WEXITSTATUS(status) == 0, where
    return ""


def run(top: Path, wanted: int, seed: int | None = None) -> dict[str, object]:
    """Kills `wanted` times; a run that has come to its end is compared, and a new one begun."""
    top.mkdir(parents=True, exist_ok=True)
    spec = prepare(top)
    expected, points = reached(spec, RunInputs.open(spec))
    seed = random.randrange(1 << 32) if seed is None else seed
    choice = random.Random(seed)
    places: list[str] = []
    finished = 0
    while len(places) < wanted - 1 or not finished:
        here = replace(spec, out=top / f"killed-{finished}")
        report = top / f"report-{finished}"
        if len(places) < wanted - 1:
            where = kill(here, report, choice, points)
            places += [where] if where else []
        else:
            pid = child(here, report, lambda point: None)
            assert os.waitpid(pid, 0)[1] == 0, f"seed {seed}: it did not go on"
        if report.exists():
            found = json.loads(report.read_text())
            assert found == expected, f"seed {seed}, killed {', '.join(places)}"
            assert not list((here.out / FOLDER).glob(".new-*"))
            finished += 1
    left = replace(spec, out=top / "left")
    pid = child(left, top / "none", killer("step", choice.randint(7, 15)))
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    return {
        "kills": len(places) + 1,
        "runs": finished,
        "same_bytes": True,
        "seed": seed,
        "left": str(left.out),
        "expected": expected,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    print(json.dumps(run(folder, int(sys.argv[2]))))
