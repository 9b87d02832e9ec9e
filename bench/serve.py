"""Sends random prompts to a running Loraplex server and measures it.

    python bench/serve.py --target 127.0.0.1:50051 --concurrency 16 --requests 64
    python bench/serve.py --adapters zipf --names a0,a1,a2,a3 --rate 4 --requests 100

Runs a closed loop by default, and an open loop with `--rate` (Poisson arrivals). Decoding is greedy
unless `--temperature` is given, and continues after the end-of-sequence token, so every request
yields exactly the requested number of tokens. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import asdict, replace

import load
import report
from workload import Popularity, Span, Workload, arrivals, plan


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a request failed."""
    args = parse(argv)
    workload = Workload(
        popularity=args.adapters,
        adapters=args.names,
        requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        token_ids=args.token_ids,
        zipf_alpha=args.zipf_alpha,
        seed=args.seed,
    )
    measured = asyncio.run(drive(args, workload))
    settings = {
        "target": args.target,
        "adapters": args.adapters.value,
        "names": len(args.names),
        "loop": "closed" if args.rate is None else "open",
        "concurrency": args.concurrency if args.rate is None else None,
        "rate": args.rate,
        "prompt_tokens": str(args.prompt_tokens),
        "output_tokens": str(args.output_tokens),
        "zipf_alpha": args.zipf_alpha if args.adapters is Popularity.ZIPF else None,
        "seed": args.seed,
        "warmup": args.warmup,
        "temperature": args.temperature,
        "top_p": args.top_p,
    }
    head = [
        "requests",
        "errors",
        "tokens",
        "seconds",
        "tok/s",
        "ttft p50",
        "p99 ms",
        "itl p50",
        "p99 ms",
    ]
    m = measured
    row = [m.requests, m.errors, m.output_tokens, m.seconds, m.output_tok_s]
    row += [m.ttft_p50_ms, m.ttft_p99_ms, m.itl_p50_ms, m.itl_p99_ms]
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None))
    print(report.table(head, [row]))
    if m.reasons:
        print("errors:", ", ".join(f"{count} x {what}" for what, count in m.reasons.items()))
    print(report.json_line({**asdict(m), **settings}))
    return 1 if m.errors else 0


async def drive(args: argparse.Namespace, workload: Workload) -> load.Measurement:
    """Warms up with requests of the same kind but with other prompts, then measures."""
    sampling = load.Sampling(args.temperature, args.top_p)
    if args.warmup:
        warm = replace(workload, requests=args.warmup, seed=workload.seed + 1)
        await load.run(
            args.target, plan(warm), load.Pace(args.concurrency, limit_s=args.max_seconds), sampling
        )
    times = None
    if args.rate is not None:
        times = tuple(arrivals(workload.requests, args.rate, workload.seed))
    pace = load.Pace(args.concurrency, times, args.max_seconds)
    return load.measure(await load.run(args.target, plan(workload), pace, sampling))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Send requests to a running Loraplex server and measure it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--target",
        default=os.environ.get("LORAPLEX_SERVER", "127.0.0.1:50051"),
        help="the server's host:port; default from LORAPLEX_SERVER",
    )
    add("--adapters", type=Popularity, choices=list(Popularity), default=Popularity.BASE,
        help="distribution of requests over adapters")  # fmt: skip
    add(
        "--names",
        type=_names,
        default=(),
        help="registered adapters, comma-separated, most popular first",
    )
    add("--zipf-alpha", type=float, default=1.0, help="exponent of the Zipf distribution")
    add("--concurrency", type=_positive, default=16, help="requests in flight (closed loop)")
    add("--rate", type=_rate, default=None, help="requests per second (open loop, Poisson)")
    add("--requests", type=_positive, default=64, help="number of requests")
    add("--prompt-tokens", type=Span.parse, default=Span(128, 128), help="N or LOW-HIGH")
    add("--output-tokens", type=Span.parse, default=Span(64, 64), help="N or LOW-HIGH")
    add(
        "--token-ids",
        type=Span.parse,
        default=Span(256, 49_000),
        help="token ids that prompts are made of",
    )
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top-p", type=float, default=1.0)
    add("--warmup", type=int, default=16, help="requests for warm-up, not measured")
    add(
        "--max-seconds",
        type=float,
        default=300.0,
        help="time limit; requests are cancelled",
    )
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.adapters is not Popularity.BASE and not args.names:
        parser.error(f"--adapters {args.adapters.value} needs --names")
    return args


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
