"""Measures what one tenant, or one kind of sampling, costs the others.

    python bench/bench_fairness.py          (make bench-fairness)

Starts its own server with the default model and two random rank-16 adapters, a tenant each. First
the small tenant sends requests one after the other, alone; then the same beside a large tenant with
a hundred requests in flight, where the small one has one: the ratio of the 95th percentiles of the
time to the first token. Then eight streams with ordinary sampling run beside eight more of the same
kind, and beside eight with hostile parameters: the ratio of their times per token. The last line of
output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import base
import grpc
import load
import measure
import random_adapters
import report
from loraplex import LoraplexError
from loraplex.v1 import generation_pb2 as pb
from measure import BenchmarkError
from served import Server, ServerError, exit_on_sigterm
from workload import Popularity, Span, Workload, plan

LARGE = 100
"""Requests of the large tenant that are always in flight; the small tenant has one."""

ROWS = 8
TOKEN_IDS = Span(256, 49_000)
ORDINARY = pb.SamplingParams(temperature=0.7, top_p=0.95, seed=1)


def hostile() -> pb.SamplingParams:
    """Every sampling parameter at its most expensive."""
    return pb.SamplingParams(
        temperature=2.5,
        top_p=0.999999,
        repetition_penalty=1.5,
        presence_penalty=1.5,
        frequency_penalty=1.5,
        logit_bias=dict.fromkeys(range(1000, 1300), 50.0),
        seed=1,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    directory = base.ensure(cache=args.cache)
    directories = random_adapters.write(directory, args.work / "adapters", 2, 16)
    store = args.work / "store-fairness"
    shutil.rmtree(store, ignore_errors=True)
    settings = {
        "cache": args.cache,
        "store": store,
        "import_root": directories[0].parent,
        "device": args.device,
        "dtype": args.dtype,
    }
    try:
        with Server(settings, args.work / "server.log") as server:
            small, large = measure.register(server.address, directories)
            first_tokens(server.address, small, args, args.requests // 4, seed=1)  # warms up
            alone = first_tokens(server.address, small, args, args.requests, seed=2)
            with Tenant(server.address, large, args):
                beside = first_tokens(server.address, small, args, args.requests, seed=3)
            plain, disturbed = sampling(server.address, args)
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [
        [name, 1e3 * load.percentile(times, 50), 1e3 * load.percentile(times, 95)]
        for name, times in (("alone", alone), (f"beside {LARGE} times its load", beside))
    ]
    print(report.table(["small tenant", "ttft p50 ms", "ttft p95 ms"], rows))
    rows = [["ordinary", 1e3 * plain], ["hostile", 1e3 * disturbed]]
    print(report.table([f"{ROWS} ordinary streams beside {ROWS}", "ms per token"], rows))
    ratio = load.percentile(beside, 95) / load.percentile(alone, 95)
    print(
        report.json_line(
            {
                "p95_ttft_ratio": ratio,
                "hostile_sampling_step_ratio": disturbed / plain,
                "p95_ttft_alone_ms": 1e3 * load.percentile(alone, 95),
                "p95_ttft_beside_ms": 1e3 * load.percentile(beside, 95),
                "prompt_tokens": args.prompt_tokens,
                "output_tokens": args.output_tokens,
            }
        )
    )
    return 0


def first_tokens(
    address: str, name: str, args: argparse.Namespace, count: int, seed: int
) -> list[float]:
    """Times to the first token of requests that are sent one after the other."""
    lengths = Span(args.prompt_tokens, args.prompt_tokens), Span(8, 8)
    work = Workload(Popularity.IDENTICAL, (name,), count, *lengths, TOKEN_IDS, seed=seed)
    answers = asyncio.run(load.run(address, plan(work), load.Pace(1)))
    if errors := [answer.error for answer in answers if answer.error]:
        raise BenchmarkError(f"the small tenant's requests failed: {errors[:3]}")
    return [answer.tokens[0][0] - answer.sent for answer in answers]


class Tenant:
    """The large tenant, in a process of its own of low priority, within a `with` statement."""

    def __init__(self, address: str, name: str, args: argparse.Namespace) -> None:
        script = Path(__file__).with_name("serve.py")
        command = ["nice", "-n", "10", sys.executable, str(script), "--target", address]
        command += ["--adapters", "identical", "--names", name, "--warmup", "0"]
        command += ["--concurrency", str(LARGE), "--requests", str(LARGE * 100)]
        command += ["--prompt-tokens", str(args.prompt_tokens)]
        command += ["--output-tokens", str(args.output_tokens), "--max-seconds", "600"]
        self._command = command

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        time.sleep(5.0)  # until all its requests are in flight

    def __exit__(self, *_: object) -> None:
        ended = self._process.poll()
        self._process.kill()
        self._process.wait()
        if ended is not None:
            raise BenchmarkError("the large tenant ended before the small one had finished")


def sampling(address: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds per token of ordinary streams beside ordinary ones, and beside hostile ones."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for is_hostile in (False, True) * args.repeats:
        others = hostile() if is_hostile else ORDINARY
        found[is_hostile].append(asyncio.run(_streams(address, others, args)))
    return statistics.median(found[False]), statistics.median(found[True])


async def _streams(address: str, others: pb.SamplingParams, args: argparse.Namespace) -> float:
    """Seconds per token of `ROWS` ordinary streams beside as many with other parameters."""
    rng = random.Random(7)
    async with grpc.aio.insecure_channel(address) as channel:
        call: load.Call = channel.unary_stream(load.METHOD)

        async def stream(sampling: pb.SamplingParams, tokens: int) -> list[float]:
            ids = [TOKEN_IDS.pick(rng) for _ in range(16)]
            request = pb.GenerateStreamRequest(
                request=pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=ids),
                    sampling=sampling,
                    stop=pb.StopConditions(max_new_tokens=tokens, ignore_eos=True),
                )
            )
            return [time.perf_counter() async for _ in call(request.SerializeToString())]

        # The others run for longer, so that the ordinary streams are never alone.
        extra = [asyncio.ensure_future(stream(others, 8 * args.stream_tokens)) for _ in range(ROWS)]
        await asyncio.sleep(1.0)
        ordinary = (stream(ORDINARY, args.stream_tokens) for _ in range(ROWS))
        times: Sequence[list[float]] = await asyncio.gather(*ordinary)
        for task in extra:
            task.cancel()
        await asyncio.gather(*extra, return_exceptions=True)
    seconds = [each[-1] - each[1] for each in times]  # after the first token
    return statistics.median(seconds) / (args.stream_tokens - 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what one tenant and hostile sampling cost the others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench"), help="folder for adapters, store and logs")
    add("--prompt-tokens", type=int, default=128, help="of both tenants' requests")
    add("--output-tokens", type=int, default=64, help="of the large tenant's requests")
    add("--requests", type=int, default=40, help="requests of the small tenant in each part")
    add("--stream-tokens", type=int, default=100, help="tokens of the ordinary streams")
    add("--repeats", type=int, default=3, help="runs with each kind of sampling")
    add("--device", default="auto")
    add("--dtype", default="bfloat16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
