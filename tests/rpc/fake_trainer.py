"""A trainer for tests of who supervises one: it does what its data says, a line each.

    {"text": "step 3"}          goes up to step 3, and saves there
    {"text": "eval 0.5"}        an evaluation with this loss
    {"text": "sample hi"}       a sampled answer
    {"text": "export DIR"}      the adapter as it is now is a copy of that one
    {"text": "hold"}            goes on only when `release` lies in the job's folder, or SIGINT came
    {"text": "deaf"}            SIGINT does nothing from here on
    {"text": "publish DIR"}     ends well, with a copy of that adapter
    {"text": "diverge"}         ends as one whose loss is not finite
    {"text": "die SIGKILL"}     dies of that signal
    {"text": "complain REASON what is wrong"}   ends as the trainer does with a Refusal; several
                                problems have " | " between them, a field goes before " @ "
    {"text": "say anything"}    prints that on standard output
    {"text": "flood"}           prints a line of 3 MiB there
    {"text": "moan anything"}   prints that on standard error
    {"text": "plan 1000"}       what `plan` says that it takes, in bytes
    {"text": "refuse REASON what is wrong"}     what `plan` says in place of that
    {"text": "slow"}            `plan` goes on only when `release` lies in the job's folder

It is called as the trainer is: `plan --config F --json`, `run --config F --events -`,
`resume DIR --events -`; a resumed one goes on behind the last line that had saved.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path


class Interrupted(Exception):
    pass


def emit(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def complain(text: str) -> None:
    reason, _, problem = text.partition(" ")
    problems = []
    for one in problem.split(" | "):
        field, _, message = one.rpartition(" @ ")
        problems.append({"field": field, "message": message})
        print("error: for people", file=sys.stderr, flush=True)
    emit("Failed", reason=reason, problems=problems)
    sys.exit(2)


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.005)


def plan(lines: list[str], folder: Path) -> None:
    size = 1000
    for line in lines:
        verb, _, rest = line.partition(" ")
        if verb == "refuse":
            complain(rest)
        if verb == "slow":
            (folder / "planning").touch()
            wait_for(folder / "release")
        if verb == "plan":
            size = int(rest)
    print("a word before")
    print(json.dumps({"bytes": size, "device": "cpu", "more": [1]}), flush=True)


def train(name: str, lines: list[str], run: Path, steps: int) -> None:
    checkpoints = run / "checkpoints"
    begun = max((int(p.name) for p in checkpoints.glob("0*")), default=0)
    # The file is missing if the run was ended between its first checkpoint and its line.
    first = int((run / "line").read_text()) if begun and (run / "line").exists() else 0
    checkpoints.mkdir(parents=True, exist_ok=True)
    emit("RunStarted", jobs=[name], steps=[steps], step=begun, device="cpu", estimated_bytes=2000,
         optimisers=["none"])  # fmt: skip
    step = begun
    for number, line in enumerate(lines):
        if number < first:
            continue
        verb, _, rest = line.partition(" ")
        match verb:
            case "step":
                while step < int(rest):
                    step += 1
                    emit("StepDone", job=name, step=step, loss=1 / step, rate=0.1, norm=2.0,
                         tokens=100, learned=50, seconds=0.5)  # fmt: skip
                (checkpoints / f"{step:06d}").mkdir(exist_ok=True)
                (run / "line").write_text(str(number + 1))
                emit("Saved", step=step, path=str(checkpoints))
            case "eval":
                emit("Evaluated", job=name, step=step, loss=float(rest), perplexity=2.0,
                     metric=None, best=True)  # fmt: skip
            case "sample":
                emit("Sampled", job=name, step=step, prompt="p", answer=rest, reference="r")
            case "export":
                path = run / f"step-{step}"
                shutil.copytree(rest, path, dirs_exist_ok=True)
                emit("Exported", job=name, step=step, path=str(path))
            case "hold":
                wait_for(run.parent / "release")
            case "deaf":
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            case "publish":
                # A run that is resumed may have been ended within these lines.
                shutil.copytree(rest, run / "adapter", dirs_exist_ok=True)
                emit("JobEnded", job=name, state="finished", step=step, reason="all steps are done")
                emit("Published", job=name, path=str(run / "adapter"), digest="", version="")
                emit("RunEnded", seconds=1.0, tokens=100 * step, peak_bytes=3000)
                return
            case "diverge":
                emit("JobEnded", job=name, state="diverged", step=step,
                     reason="the loss is not finite")  # fmt: skip
                sys.exit(1)
            case "die":
                os.kill(os.getpid(), signal.Signals[rest])
                time.sleep(60)
            case "complain":
                complain(rest)
            case "say":
                print(rest, flush=True)
            case "flood":
                print("x" * (3 << 20))
            case "moan":
                print(rest, file=sys.stderr, flush=True)


def main() -> None:
    command = sys.argv[1]

    def interrupt(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGINT, interrupt)
    run = Path(sys.argv[2])
    folder = run.parent if command == "resume" else Path(sys.argv[3]).parent
    with (folder / "job.toml").open("rb") as file:
        config = tomllib.load(file)
    (job,) = config["job"]
    run = Path(config["run"]["out"])
    with (folder / "calls").open("a") as file:
        file.write(f"{' '.join(sys.argv[1:2])} {os.getpid()} {os.nice(0)}\n")
    lines = [json.loads(line)["text"] for line in Path(job["data"]).read_text().splitlines()]
    try:
        if command == "plan":
            plan(lines, folder)
        else:
            train(job["name"], lines, run, job["steps"])
    except Interrupted:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


main()
