"""A soak: clients of every kind, first alone, then while engine, front and index are disturbed.

    python tests/soak/run.py --duration 300 [--model default]          (make soak DURATION=300)

The first six tenths of the time are undisturbed, in two halves. At rest after each half nothing
may be held for anybody, and what is open at the second rest but was not at the first is printed.
Then the engine is killed, the front is killed and started again, the index is locked, and batches
are made to fail. The last line of output is one JSON object. Exit code 1 if an answer was wrong,
or anything is unexplained or left.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import numpy as np
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc, generation_pb2_grpc
from rpc.harness import CRASH, FAULT, NONFINITE, ask, config_for, write_adapter, write_prompt
from soak.answers import OracleAnswers, RealAnswers
from soak.clients import CLIENTS, Stage
from soak.judging import Verdict
from soak.process import ServerProcess, Taken, settings_for

LORAS, PROMPTS = range(8), (5, 6)
STEADY = ("steady-a", "steady-b", "steady-c")
CHANGING = tuple(f"changing-{i}" for i in range(6))
CALM = 0.6
REST_SECONDS = 60.0


def oracle_settings(folder: Path) -> dict[str, object]:
    """A server over the model without weights, with little room in every tier."""
    for seed in LORAS:
        write_adapter(folder / "import" / f"seed-{seed}", seed)
    for tokens in PROMPTS:
        write_prompt(folder / "import" / f"prompt-{tokens}", tokens, tokens)
    size = sum(file.stat().st_size for file in (folder / "import" / "seed-0").iterdir())
    options = {
        "num_blocks": 400,
        "prefix_blocks": 8,
        "adapter_budget_bytes": 5 * size + 100,
        "host_budget_bytes": 3 * size + 100,
        "merge_budget_bytes": size + 100,
        "merges_files": True,
        "num_slots": 5,
        "step_seconds": 0.002,
    }
    made = config_for(folder, engine_options=options)
    return settings_for(
        folder,
        engine_factory=made.engine_factory,
        engine_options=made.engine_options,
        max_running=16,
        token_budget=64,
    )


def real_settings(folder: Path, cache: Path) -> dict[str, object]:
    """A server of the default model, with room for few of the adapters."""
    bench = Path(__file__).resolve().parents[2] / "bench"
    sys.path.insert(0, str(bench))
    import base
    import random_adapters

    directory = base.ensure(cache=cache)
    random_adapters.write(directory, folder / "import", len(LORAS), 8)
    return settings_for(folder, cache=str(cache.absolute()), adapter_memory="30MiB")


async def register(
    server: ServerProcess, folder: Path, stage: Stage, virtual: dict[str, int]
) -> None:
    """Registers every folder once to learn its digest, then the names of the soak."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)

        async def put(name: str, path: str) -> pb.Adapter:
            request = pb.RegisterAdapterRequest(name=name, path=path)
            told = (await adapters.RegisterAdapter(request)).adapter
            stage.history.setdefault(name, set()).add(told.digest)
            return told

        for path in sorted(each.name for each in (folder / "import").iterdir()):
            told = await put(f"first-{path}", path)
            stage.folders[told.digest] = path
            virtual[told.digest] = told.virtual_tokens
        # Changes of a place concern the content, so steady names have content of their own.
        plain = [path for digest, path in stage.folders.items() if not virtual[digest]]
        for name, path in zip(STEADY, plain, strict=False):
            await put(name, path)
        steady = {digest for name in STEADY for digest in stage.history[name]}
        stage.folders = {d: path for d, path in stage.folders.items() if d not in steady}
        for name, path in zip(stage.changing, stage.folders.values(), strict=False):
            await put(name, path)


async def rest(server: ServerProcess) -> list[str]:
    """Waits until nothing is held for a client; returns what still is, after `REST_SECONDS`."""
    end = time.monotonic() + REST_SECONDS
    gc.collect()  # Channels of clients that were interrupted stay open until their cycle is found.
    while True:
        with suppress(OSError):
            scraped = await server.scrape()
            held = [name for name in HELD if scraped.get(name, 0.0)] + server.connections()
            if not held and scraped.get("loraplex_engine_ready") == 1.0:
                return []
            if time.monotonic() > end:
                return held or ["the engine is not ready"]
        await asyncio.sleep(0.5)


HELD = (
    "loraplex_queue_depth",
    "loraplex_queued_tokens",
    "loraplex_running_requests",
    "loraplex_kv_blocks[('state', 'used')]",
    "loraplex_adapters[('state', 'draining')]",
    "loraplex_adapters[('state', 'loading')]",
)


async def clients(stage: Stage, seconds: float, seed: int) -> None:
    """Runs the clients of every kind for a time."""
    stage.end = time.monotonic() + seconds
    running = [
        asyncio.create_task(client(stage, random.Random(f"{seed} {name} {number}")))
        for name, (client, count) in CLIENTS.items()
        for number in range(count)
    ]
    await asyncio.gather(*running)


async def disturb(server: ServerProcess, stage: Stage, seed: int, oracle: bool) -> None:
    """Disturbs the server in every way, in turn, until the clients stop."""
    chance, verdict = random.Random(seed), stage.verdict
    kinds = ["engine killed", "front killed", "index away"] + ["engine fault"] * oracle
    while not stage.over:
        for kind in chance.sample(kinds, len(kinds)):
            await asyncio.sleep(min(8.0, max(0.0, stage.end - time.monotonic())))
            if stage.over:
                return
            verdict.disturb(kind)
            if kind == "engine killed":
                server.kill_engine()
            elif kind == "front killed":
                await server.kill()
                await server.start()
            elif kind == "index away":
                with server.index_away():
                    for _ in range(6):
                        await asyncio.sleep(1.0)
                        verdict.disturb(kind)
            else:
                await _provoke(stage, chance)
            verdict.disturb(kind)


async def _provoke(stage: Stage, chance: random.Random) -> None:
    """Sends a request at which the oracle fails: the row, the batch, or the process."""
    token = chance.choice((NONFINITE, FAULT, CRASH))
    if token == CRASH:
        stage.verdict.disturb("engine killed")
    async with stage.stubs() as (generation, _):
        with suppress(grpc.aio.AioRpcError):
            await generation.Generate(ask(20, token, 30, new=4), timeout=30)


class Watch:
    """Samples what the server takes every two seconds."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.samples: list[tuple[float, Taken]] = []

    async def run(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(2.0)
            self.samples.append(((time.monotonic() - began) / 60, await self._server.taken()))

    @property
    def slope(self) -> float:
        """MB a minute of all processes, over the second half of the samples."""
        later = self.samples[len(self.samples) // 2 :]
        if len(later) < 3:
            return 0.0
        times = np.array([at for at, _ in later])
        return float(
            np.polyfit(times, np.array([sum(taken.mb.values()) for _, taken in later]), 1)[0]
        )


async def soak(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs it; returns the figures."""
    oracle = args.model == "oracle"
    virtual: dict[str, int] = {}
    settings = oracle_settings(folder) if oracle else real_settings(folder, args.cache)
    server = ServerProcess(settings, folder / "server.log")
    await server.start()
    verdict = Verdict()
    answers = OracleAnswers(virtual) if oracle else RealAnswers(real_prompts(args.seed))
    changing = CHANGING if oracle else CHANGING[:4]
    stage = Stage(server.address, verdict, answers, STEADY, changing, {})
    if not oracle:
        stage.new, stage.merges = RealAnswers.COUNT, False
    try:
        await register(server, folder, stage, virtual)
        if isinstance(answers, RealAnswers):
            await learn(server, answers, stage)
        await start_checks(server)
        await clients(stage, min(60.0, args.duration / 5), args.seed)
        left = [f"after the warm-up: {each}" for each in await rest(server)]
        watch = Watch(server)
        watching = asyncio.create_task(watch.run())
        rests = []
        for half in (1, 2):
            await clients(stage, CALM / 2 * args.duration, args.seed + half)
            left += [f"at rest {half}: {each}" for each in await rest(server)]
            rests.append(await server.taken())
        watching.cancel()
        stage.end = time.monotonic() + (1 - CALM) * args.duration
        seconds = (1 - CALM) * args.duration
        await asyncio.gather(
            clients(stage, seconds, args.seed + 3), disturb(server, stage, args.seed, oracle)
        )
        left += [f"after disturbances: {each}" for each in await rest(server)]
        code = await server.stop()
        if code:
            verdict.unexpected.append(f"the server ended with code {code}")
    finally:
        with suppress(Exception):
            await server.stop()
    return report(verdict, left, watch.slope, *rests, server.starts)


async def start_checks(server: ServerProcess) -> None:
    """Asks for structured output, whose two processes start with the first forms."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        generation = generation_pb2_grpc.GenerationServiceStub(channel)
        for letters in ("a-z", "a-y", "a-x", "a-w"):
            request = ask(20, 21, new=2)
            request.structured_output.regex = f"[{letters} ]*"
            with suppress(grpc.aio.AioRpcError):  # a model without a tokenizer has no such output
                await generation.Generate(request, timeout=120)


def real_prompts(seed: int) -> list[tuple[int, ...]]:
    """Prompts of the real model, of different lengths."""
    chance = random.Random(seed)
    return [tuple(chance.randrange(256, 49_000) for _ in range(n)) for n in (1, 7, 16, 33, 64, 100)]


async def learn(server: ServerProcess, answers: RealAnswers, stage: Stage) -> None:
    """Asks the real model for all answers, alone."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        generation = generation_pb2_grpc.GenerationServiceStub(channel)
        named = {
            name: digest
            for name, digests in stage.history.items()
            if name.startswith("first-")
            for digest in digests
        }
        await answers.learn(generation, named)


def report(
    verdict: Verdict, left: list[str], slope: float, before: Taken, after: Taken, starts: int
) -> dict[str, object]:
    """Prints what was met; returns the figures."""
    for (client, reason), count in sorted(verdict.outcomes.items()):
        print(f"{client:20} {reason:24} {count}")
    for text in [*verdict.wrong[:20], *verdict.unexpected[:40], *left]:
        print(text)
    for name, mb in after.mb.items():
        print(f"{name}: {before.mb.get(name, 0.0):.0f} MB at the first rest, then {mb:.0f} MB")
    added = after.more_than(before)
    for name, count in sorted(added.items()):
        print(f"{count} more at the second rest: {name}")
    return {
        "tokens": verdict.tokens,
        "wrong_digests": len(verdict.wrong),
        "unexpected_errors": len(verdict.unexpected),
        "leaks": len(left),
        "rss_slope_mb_per_min": round(slope, 2),
        "fds_delta": after.open.total() - before.open.total(),
        "threads_delta": after.threads.total() - before.threads.total(),
        "series_delta": len(after.series) - len(before.series),
        "starts": starts,
    }


def record(file: Path, figures: Mapping[str, object]) -> None:
    """Adds the figures of a run to a JSON file, in place of those of the same model."""
    runs = json.loads(file.read_text()) if file.exists() else []
    runs = [each for each in runs if each["model"] != figures["model"]]
    file.write_text(json.dumps([*runs, figures], indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Soak a server with clients of every kind.")
    add = parser.add_argument
    add("--duration", type=float, default=300.0, help="seconds, of which four tenths are disturbed")
    add("--model", choices=("oracle", "default"), default="oracle", help="what is served")
    add("--cache", type=Path, default=Path("var/cache"), help="cache of the default model")
    add("--seed", type=int, default=1, help="random seed of all clients")
    add("--record", type=Path, metavar="FILE", help="JSON file to which the figures are added")
    add("--keep", action="store_true", help="keep the server's files and log")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="loraplex-soak-"))
    try:
        result: dict[str, Any] = asyncio.run(soak(args, folder))
    finally:
        if args.keep:
            print(f"files are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.record:
        record(args.record, {"model": args.model, "duration_s": args.duration, **result})
    print(json.dumps(result))
    bad = ("wrong_digests", "unexpected_errors", "leaks")
    return int(any(result[name] for name in bad))


if __name__ == "__main__":
    sys.exit(main())
