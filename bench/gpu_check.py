"""Checks and measures the server on a CUDA device, without network: make gpu-check

    python bench/gpu_check.py [--budget 360] [--only S2,S4] [--out DIRECTORY]
    python bench/gpu_check.py --dry

    S0 ceilings   bandwidth, arithmetic and latencies of this device: the denominators of the rest
    S1 compiled   every kernel and configuration: registers, spills, shared memory
    S2 correct    every kernel compared with float64, on random inputs and poisoned outputs
    S3 kernels    times of the kernels, of bitsandbytes and of torch
    S4 decoder    the whole decoder, eager and in graphs, compared with others and with float64
    S5 engine     tokens per second of the engine over a synthetic model, with up to 64 adapters
    S6 peer       the same bytes served by transformers and PEFT
    S7 training   a QLoRA step, compared with the same step on the CPU

Each stage is a process with a deadline of its own, so one that hangs or crashes does not stop the
next. One line is printed for each when it ends; `gpu.json` in the output directory (default: $OUT,
else var/gpu-check) holds all figures and is written after every stage. `--dry` runs every stage
with tiny sizes on a CPU, in Triton's interpreter. The last line of output is one JSON object. Exit
code 1 if a stage fails, 2 if there is no device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report as output
from gpu.stage import STAGES, Stage, StageReport, read

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "adapters", "training", "server", "client")
CARRIED = ROOT / ".gpu" / "site"
"""Packages that a machine without network may lack, put there by `make gpu-pack`."""

BUDGET, DRY_BUDGET = 360.0, 900.0
"""Seconds for everything. The interpreter is slow, and nothing is measured there."""

DRY_SHARE = 3
"""Factor on the stages' seconds without a device."""


def environment(dry: bool, stage: Stage, cache: str) -> dict[str, str]:
    """The environment of a stage's process, which sees the packages of this tree first."""
    paths = [*(str(ROOT / package) for package in PACKAGES), os.environ.get("PYTHONPATH", "")]
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", cache),
    }
    values.pop("TRITON_INTERPRET", None)
    if dry:
        values["OMP_NUM_THREADS"] = "1"
        values["CUDA_VISIBLE_DEVICES"] = ""
        if stage.module != "compiled":
            values["TRITON_INTERPRET"] = "1"
    return values


def run_stage(stage: Stage, dry: bool, seconds: float, out: Path, cache: str) -> dict[str, Any]:
    """Runs a stage in a process group of its own and returns its result."""
    path = out / f"{stage.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage.name]
    command += ["--out", str(out), "--budget", f"{seconds:.1f}", *(["--dry"] if dry else [])]
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(dry, stage, cache), start_new_session=True
    )
    ended = ""
    try:
        code = process.wait(seconds)
        if code not in (0, 1):
            ended = f"the process ended with {code}"
    except subprocess.TimeoutExpired:
        ended = f"it was ended after {seconds:.0f} s"
    finally:
        # Also on an interrupt: no process of the stage may stay on the device.
        with_children(process, signal.SIGKILL)
        process.wait()
    result = read(path)
    result.setdefault("failed", [])
    if ended or not result.get("done"):
        result["failed"] = [*result["failed"], ended or "it wrote no result"]
    return {**result, "seconds": time.monotonic() - start}


def with_children(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to all processes of a stage."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def line(stage: Stage, result: Mapping[str, Any]) -> str:
    """The line that is printed when a stage has ended."""
    failed = result["failed"]
    state = f"{len(failed)} FAILED: {failed[0]}" if failed else "right"
    checks = f"{result.get('checks', 0)} checks"
    return f"{stage.name} {stage.module:9} {result['seconds']:5.0f} s  {checks:>10}  {state}"


def summary(results: Mapping[str, Mapping[str, Any]], dry: bool) -> dict[str, Any]:
    """The object of the last line."""
    failed = [name for name, result in results.items() if result["failed"]]
    if dry:
        return {"dry": True, "stages": len(results), "failed": failed}
    figures = {name: result.get("figures", {}) for name, result in results.items()}
    ours = figures.get("S5", {}).get("tok_s", {})
    peer = figures.get("S6", {}).get("tok_s", {})
    return {
        "card": figures.get("S0", {}).get("card"),
        "failed": failed,
        "tok_s": ours,
        "roofline_share": figures.get("S5", {}).get("roofline_share", {}),
        "ratio_peft": {case: ours[case] / peer[case] for case in peer if case in ours},
    }


def print_tables(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what failed, and the table of tokens per second."""
    for name, result in results.items():
        for text in result["failed"]:
            print(f"{name} failed: {text}")
    found = summary(results, dry=False)
    rows = [
        [case, rate, found["roofline_share"].get(case, "-"), found["ratio_peft"].get(case, "-")]
        for case, rate in found["tok_s"].items()
    ]
    if rows:
        print(output.table(["case", "tok/s", "share of roofline", "over PEFT"], rows))


def run_all(stages: Sequence[Stage], dry: bool, budget: float, out: Path) -> int:
    """Runs the stages within the budget; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    saved = 0.0
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for stage in stages:
            share = stage.seconds * (DRY_SHARE if dry else 1)
            seconds = min(share + saved, end - time.monotonic() - 1)
            if seconds < 2:
                result: dict[str, Any] = {"failed": ["no time was left for it"], "seconds": 0.0}
            else:
                result = run_stage(stage, dry, seconds, out, cache)
            saved = max(0.0, saved + share - result["seconds"])
            results[stage.name] = result
            print(line(stage, result), flush=True)
            text = output.json_line({"stages": results, "summary": summary(results, dry)})
            (out / "gpu.json").write_text(text + "\n", "utf-8")
    print()
    if not dry:
        print_tables(results)
    print(output.json_line(summary(results, dry)))
    return int(any(result["failed"] for result in results.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check and measure the server on a CUDA device.")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--dry", action="store_true", help="every stage, tiny, on a CPU")
    parser.add_argument("--only", default=",".join(names), help="stages, such as S2,S4")
    parser.add_argument("--budget", type=float, help="seconds for everything (default: 360)")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(names):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; stages: {', '.join(names)}")
    default = ROOT / "var" / ("gpu-check-dry" if args.dry else "gpu-check")
    out = (args.out or Path(os.environ.get("OUT") or default)).resolve()
    if args.stage:
        sys.path.append(str(CARRIED))  # last, so that installed packages come first
        stage = next(stage for stage in STAGES if stage.name == args.stage)
        device = "cpu" if args.dry else "cuda"
        report = StageReport(out / f"{stage.name}.json", args.dry, device, args.budget)
        return int(not report.run(lambda own: load(stage).run(own)))
    if not args.dry and (why := no_device()):
        print(why, file=sys.stderr)
        return 2
    wanted = [stage for stage in STAGES if stage.name in args.only.split(",")]
    return run_all(wanted, args.dry, args.budget or (DRY_BUDGET if args.dry else BUDGET), out)


def load(stage: Stage) -> Any:
    """The module of a stage."""
    return importlib.import_module(f"gpu.{stage.module}")


def no_device() -> str:
    """Why nothing can be measured here; "" if there is a device."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return (
        f"torch {torch.__version__} ({built}) finds no CUDA device;"
        " --dry runs every stage on a CPU, in Triton's interpreter"
    )


if __name__ == "__main__":
    sys.exit(main())
