"""Measures the gain of automatic merging in the engine: tokens per second with it off and on.

    python bench/merge_gain.py --engine --rank 64 --rounds 16

Runs `EngineCore` with the default model in this process, without a server. A round is a number of
equal requests for one adapter that are submitted at once. The engine decides to merge after some
rounds, so the result is the median of the second half of the rounds. The last line of output is one
JSON object.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import merge_gain
import report


@dataclass(frozen=True, slots=True)
class Load:
    """One round: `requests` of `prompt` tokens each, answered with `new` tokens each."""

    requests: int = 16
    prompt: int = 128
    new: int = 64


def run(cache: Path, rank: int, rounds: int, load: Load) -> dict[str, object]:
    """Returns tokens per second without and with automatic merging, and their ratio."""
    from loraplex_server.engine.adapters.auto_merge import MergePolicy

    runner = _runner(cache, rank, load)
    speeds: dict[str, float] = {}
    merged_at_end = False
    for name, policy in (("off", None), ("on", MergePolicy())):
        rates, merged_at_end = _rounds(runner, policy, rounds, load)
        for number, rate in enumerate(rates):
            print(f"merge_auto {name:3} round {number:2} {rate:8.1f} tok/s", flush=True)
        speeds[name] = statistics.median(rates[len(rates) // 2 :])
    ratio = speeds["on"] / speeds["off"]
    lines = [[f"merge_auto {name}", speed] for name, speed in speeds.items()]
    print(report.table(("way", "tok/s"), [*lines, ["on / off", ratio]]))
    return {
        "rank": rank,
        "rounds": rounds,
        "requests": load.requests,
        "unmerged_tok_s": speeds["off"],
        "automatic_tok_s": speeds["on"],
        "ratio": ratio,
        "merged_at_end": merged_at_end,
    }


def _runner(cache: Path, rank: int, load: Load):
    """A local runner for which every adapter is the same random one of the given rank."""
    from loraplex_model.adapters.merge import merged_nbytes
    from loraplex_model.adapters.pack import pack
    from loraplex_server.engine.runner.config import RunnerConfig
    from loraplex_server.engine.runner.local import ReadAdapter, build

    config = RunnerConfig(
        model="default",
        dtype="bfloat16",
        device="cpu",
        threads=0,
        cache=str(cache),
        max_context=0,
        kv_tokens=load.requests * (load.prompt + load.new + 16),
        kv_memory=0,
        adapter_memory=1 << 30,
        max_rank=rank,
        merge_memory=1 << 30,
        merge_dtype="bfloat16",
    )
    runner = build(config)
    weights = runner.decoder.weights
    delta = merge_gain.random_lora(weights.config, rank)
    dense = merged_nbytes(delta, weights.config, runner.merge_dtype)
    adapter = ReadAdapter(pack(delta, weights.embed.dtype), dense)
    runner.read_adapter = lambda ref: adapter
    return runner


def _rounds(runner, policy, rounds: int, load: Load) -> tuple[list[float], bool]:
    """Tokens per second of each round, and whether the adapter was merged after the last."""
    from loraplex_server.engine.core import EngineCore
    from loraplex_server.engine.messages import AdapterRef, SamplingParams, Submit, Unload

    core = EngineCore(runner, merge_policy=policy)
    adapter = AdapterRef("sha256:" + "0" * 64, "")
    rates = []
    for number in range(rounds):
        for index in range(load.requests):
            first = 300 + number * load.requests + index
            tokens = [first + position for position in range(load.prompt)]
            greedy = SamplingParams(temperature=0.0)
            core.add(Submit(number * load.requests + index, tokens, load.new, [adapter], greedy))
        began = time.perf_counter()
        _finish(core)
        rates.append(load.requests * load.new / (time.perf_counter() - began))
    merged = any(status.merged_bytes for status in core.adapters.statuses())
    core.control(Unload(1, adapter.digest))
    _finish(core)
    return rates, merged


def _finish(core) -> None:
    """Steps until all requests and orders are answered; a merge may still be in progress."""
    while not core.idle:
        wait = core.wait_seconds()
        if wait != 0.0:
            time.sleep(0.001)  # for the thread that reads the adapter
        core.step()
