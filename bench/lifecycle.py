"""Scenes of adapter management on a running server, and their effect on the requests it serves.

Each scene returns numbers and prints nothing. Every answer is compared token by token with what the
same adapter returned for the same prompt before, and its digest with the registered one.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path

import load
import psutil
from loraplex import AsyncClient, Client
from measure import BenchmarkError
from workload import Job, Popularity, Span, Workload, plan

PROMPT = tuple(range(1000, 1032))
Tokens = tuple[int, ...]
POPULAR = 5
"""Number of the most popular adapters whose latency is measured in the Zipf traffic."""


async def streams(address: str, adapters: Sequence[str], tokens: int) -> list[load.Answer]:
    """Runs one greedy stream for each of `adapters`, all at once. Raises BenchmarkError."""
    jobs = [Job(name, PROMPT, tokens) for name in adapters]
    answers = await load.run(address, jobs, load.Pace(len(jobs)))
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise BenchmarkError(f"streams failed: {failed}")
    return answers


def decode_gaps(answers: Sequence[load.Answer]) -> list[float]:
    """Seconds between tokens after all streams have started, so that no gap includes a prompt."""
    begun = max(answer.tokens[0][0] for answer in answers)
    found = []
    for answer in answers:
        times = [at for at, _ in answer.tokens if at >= begun]
        found += [after - before for before, after in itertools.pairwise(times)]
    return found


async def cold_burst(
    address: str, running: Sequence[str], cold: Sequence[str], tokens: int
) -> dict[str, float]:
    """Growth of the longest gap between tokens while `cold` adapters are loaded at once.

    The streams without loads run for as long as those with loads, so that delays of the machine
    itself are equally likely in both.
    """
    await streams(address, running, tokens)
    gc.collect()
    gc.freeze()  # a garbage collection in this process would show as a gap
    command = [sys.executable, str(Path(__file__).with_name("burst.py")), address, *cold]
    burst = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert burst.stdin is not None
    assert burst.stdout is not None
    if not await burst.stdout.readline():
        raise BenchmarkError("the process that loads adapters did not start")
    first = asyncio.create_task(streams(address, running, tokens))
    await asyncio.sleep(1)
    burst.stdin.write(b"load\n")
    loading = asyncio.create_task(burst.stdout.readline())
    busy = decode_gaps(await first)
    rounds = 1
    while not loading.done():
        busy += decode_gaps(await streams(address, running, tokens))
        rounds += 1
    told = await loading
    burst.stdin.write(b"end\n")
    if await burst.wait():
        raise BenchmarkError("the adapters could not be loaded; see above")
    quiet = []
    for _ in range(rounds):
        quiet += decode_gaps(await streams(address, running, tokens))
    step = load.percentile(quiet, 50)
    return {
        "step_ms": 1e3 * step,
        "worst_gap_quiet_ms": 1e3 * max(quiet),
        "worst_gap_loading_ms": 1e3 * max(busy),
        "cold_load_extra_gap_steps": (max(busy) - max(quiet)) / step,
        "cold_loads_s": float(told),
    }


async def replacing(
    address: str, versions: Sequence[Path], rounds: int, tokens: int
) -> dict[str, int]:
    """Moves a name from one adapter's bytes to another's while streams use that name.

    A stream must have the tokens of the digest that it reports, and that digest must be the one
    that the name had when the call was made. If the name moved during the call, either digest is
    accepted.
    """
    wrong = checked = 0
    known: dict[str, Tokens] = {}
    async with AsyncClient(address, timeout=300) as client:
        for directory in versions:
            name = f"known-{directory.name}"
            await client.register_adapter(name, directory.name)
            (answer,) = await streams(address, [name], tokens)
            known[answer.digest] = answer.token_ids
        if len(set(known.values())) != len(versions):
            raise BenchmarkError("the versions give the same tokens and cannot be distinguished")
        turns = itertools.cycle(versions)
        first = await client.register_adapter("moving", next(turns).name, replace=True)
        current = first.adapter.digest
        for _ in range(rounds):
            during = asyncio.create_task(streams(address, ["moving"] * 3, tokens))
            await asyncio.sleep(0.05)
            moved = await client.register_adapter("moving", next(turns).name, replace=True)
            after = asyncio.create_task(streams(address, ["moving"], tokens))
            for answer in await during:
                checked += 1
                wrong += answer.digest not in (current, moved.adapter.digest)
                wrong += answer.token_ids != known[answer.digest]
            current = moved.adapter.digest
            (answer,) = await after
            checked += 1
            wrong += answer.digest != current or answer.token_ids != known[current]
    return {"replace_checked": checked, "replace_wrong_digests": wrong}


def throughput(address: str, names: Sequence[str], requests: int, tokens: int, seed: int) -> float:
    """Output tokens per second with 16 concurrent requests, spread uniformly over `names`."""
    workload = Workload(
        Popularity.DISTINCT,
        tuple(names),
        requests,
        Span(64, 64),
        Span(tokens, tokens),
        Span(256, 49_000),
        seed=seed,
    )
    measured = load.measure(asyncio.run(load.run(address, plan(workload), load.Pace(16))))
    if measured.errors:
        raise BenchmarkError(f"requests failed: {measured.reasons}")
    return measured.output_tok_s


def zipf(
    address: str, names: Sequence[str], requests: int, tokens: int, pids: Sequence[int]
) -> dict[str, object]:
    """Sends Zipf traffic over more adapters than fit. Measures correctness, latency and memory.

    An answer is correct if it equals that of the adapter for the same prompt at any other time. The
    latency ratio compares the popular adapters in this traffic with traffic for them only.
    """
    workload = Workload(
        Popularity.ZIPF,
        tuple(names),
        requests,
        Span(8, 8),
        Span(tokens, tokens),
        Span(256, 49_000),
        seed=5,
    )
    jobs = [Job(job.adapter, PROMPT, job.output_tokens) for job in plan(workload)]
    half = len(jobs) // 2
    calm = [Job(names[i % POPULAR], PROMPT, tokens) for i in range(half)]
    alone = asyncio.run(load.run(address, calm, load.Pace(16)))
    first = asyncio.run(load.run(address, jobs[:half], load.Pace(16)))
    middle = _rss(pids)
    second = asyncio.run(load.run(address, jobs[half:], load.Pace(16)))
    answers = [*first, *second]
    said: dict[str, set[Tokens]] = {}
    for answer in answers:
        said.setdefault(answer.job.adapter, set()).add(answer.token_ids)
    popular = [a for a in answers if a.job.adapter in names[:POPULAR]]
    p99, p99_alone = (load.measure(a).ttft_p99_ms for a in (popular, alone))
    return {
        "zipf_requests": len(answers),
        "zipf_errors": sum(bool(a.error) for a in answers),
        "zipf_adapters": len(said),
        "zipf_ambiguous": sum(len(tokens) > 1 for tokens in said.values()),
        "zipf_popular_ttft_p99_ms": p99,
        "zipf_popular_ttft_p99_ratio": p99 / p99_alone,
        "rss_growth": _rss(pids) / middle,
    }


def register(address: str, directories: Sequence[Path]) -> tuple[str, ...]:
    """Registers directories below the import root under their folders' names, without loading."""
    with Client(address, timeout=300) as client:
        for directory in directories:
            client.register_adapter(directory.name, directory.name)
    return tuple(directory.name for directory in directories)


def _rss(pids: Sequence[int]) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def copies(template: Path, out: Path, count: int) -> list[Path]:
    """Copies of the adapter in `template`, each with different numbers: `<out>/b0`, `b1`, ..."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(template / "adapter_model.safetensors")
    directories = [out / f"b{i}" for i in range(count)]
    for i, directory in enumerate(directories):
        if (directory / "adapter_model.safetensors").exists():
            continue
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(template / "adapter_config.json", directory)
        generator = torch.Generator().manual_seed(i)
        own = {
            name: tensor
            if "lora_A" in name
            else torch.randn(tensor.shape, generator=generator).mul_(0.05).to(tensor.dtype)
            for name, tensor in tensors.items()
        }
        unfinished = directory / "unfinished"
        save_file(own, unfinished, {"format": "pt"})
        unfinished.rename(directory / "adapter_model.safetensors")
    return directories
