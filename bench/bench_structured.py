"""Measures structured output: whether answers are valid, and what it costs the requests beside it.

    python bench/bench_structured.py            (make bench-structured)

Starts its own server with the default model.

- Every schema of `tests/structured/schemas` that the server accepts is asked for once, with a
  prompt that tells of it. `of` answers ended by themselves, and `valid` of them are JSON and valid
  by `jsonschema`.
- A request without structured output is measured beside three others, which ask for structured
  output or, in turns, do not. `bystander_share` is the median ratio of its tokens per second. All
  requests decode in every step, and the prompts are equally long.
- The time of a mask is measured in this process, along the valid answers, in microseconds.

The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base
import numpy as np
import report
import torch
from loraplex import AsyncClient, FinishReason, LoraplexError
from loraplex_model.base.info import BaseInfo
from loraplex_model.checkpoints.load import load_base
from loraplex_server.engine.structures.library import new_matcher, read_tokenizer
from loraplex_server.forms.form import FormKind, StructureForm
from loraplex_server.forms.grammars import grammar_of
from served import Server, ServerError, exit_on_sigterm

CORPUS = Path(__file__).parents[1] / "tests" / "structured" / "schemas" / "corpus.jsonl"
PEOPLE = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "city": {"enum": ["Bern", "Lima", "Oslo", "Pune"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "city", "tags"],
        "additionalProperties": False,
    },
    "minItems": 200,
}
"""Never complete within the tokens of a round, so that all rows decode in every step."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model answered to the corpus: texts that ended by themselves, by schema."""

    stopped: list[tuple[Any, str]]
    asked: int

    def valid(self) -> list[tuple[Any, str]]:
        """Those that are JSON and valid by their schemas."""
        return [each for each in self.stopped if is_valid(*each)]


def is_valid(schema: Any, text: str) -> bool:
    import jsonschema

    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


async def answers(address: str, schemas: Sequence[Any], tokens: int, at_once: int) -> Answers:
    """Asks for every schema once."""
    places = asyncio.Semaphore(at_once)
    stopped: list[tuple[Any, str]] = []

    async def ask(client: AsyncClient, number: int, schema: Any) -> None:
        async with places:
            text = f"Give an example of JSON for this schema: {json.dumps(schema)[:600]}"
            done = await client.generate(
                messages=[{"role": "user", "content": text}],
                json_schema=json.dumps(schema, ensure_ascii=False),
                max_new_tokens=tokens,
                temperature=0.7,
                seed=number,
            )
            if done.finish_reason is FinishReason.STOP:
                stopped.append((schema, done.text))

    async with AsyncClient(address) as client:
        await asyncio.gather(*(ask(client, i, schema) for i, schema in enumerate(schemas)))
    return Answers(stopped, len(schemas))


async def rate_beside(address: str, tokens: int, seed: int, is_structured: bool) -> float:
    """Tokens per second of a request beside three others, once all of them decode."""
    rng = np.random.default_rng(seed)

    async def others(client: AsyncClient, started: asyncio.Barrier) -> None:
        prompt = rng.integers(256, 49_000, 64).tolist()
        form: dict[str, Any] = {"json_schema": PEOPLE} if is_structured else {}
        stream = client.stream(
            token_ids=prompt, max_new_tokens=4 * tokens, ignore_eos=True, temperature=0.7, **form
        )
        waits = True
        async for _ in stream:
            if waits:
                waits = False
                await started.wait()

    async def bystander(client: AsyncClient, started: asyncio.Barrier) -> float:
        prompt = rng.integers(256, 49_000, 64).tolist()
        stream = client.stream(
            token_ids=prompt, max_new_tokens=tokens, ignore_eos=True, temperature=0.0
        )
        times: list[float] = []
        async for _ in stream:
            if not times:
                await started.wait()
            times.append(time.perf_counter())
        return (tokens - 1) / (times[-1] - times[0])

    async with AsyncClient(address) as client:
        started = asyncio.Barrier(4)
        beside = [asyncio.create_task(others(client, started)) for _ in range(3)]
        try:
            return await bystander(client, started)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


async def measured(
    address: str, schemas: Sequence[Any], args: argparse.Namespace
) -> tuple[Answers, dict[bool, list[float]]]:
    """The answers, and the bystander's rates with and without structured output beside it."""
    found = await answers(address, schemas, args.tokens, args.at_once)
    print(f"{len(found.stopped)} of {found.asked} answers ended by themselves", flush=True)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(args.rounds + 1):
        for kind in (True, False) if seed % 2 else (False, True):
            rate = await rate_beside(address, args.tokens, seed, kind)
            if seed:  # the first round warms up
                rates[kind].append(rate)
    return found, rates


def mask_times(tokenizer: Path, info: BaseInfo, texts: Sequence[tuple[Any, str]]) -> list[float]:
    """Microseconds of every mask along the texts, in this process and one after the other."""
    vocab_size = info.config.vocab_size
    tokens = read_tokenizer(tokenizer, vocab_size)
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    times = []
    for schema, text in texts:
        form = StructureForm(FormKind.JSON_SCHEMA, [json.dumps(schema, ensure_ascii=False)])
        matcher = new_matcher(tokens, grammar_of(form), True)
        for token in tokens.tokenize_str(text):
            begun = time.perf_counter()
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            times.append((time.perf_counter() - begun) * 1e6)
            matcher.consume_token(token)
    return times


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    entries = [json.loads(line) for line in CORPUS.read_text("utf-8").splitlines()]
    schemas = [entry["schema"] for entry in entries if not entry.get("refused")]
    # Each token is sent at once, so that its time is that of its step.
    settings = {"cache": args.cache, "store": args.work / "store", "stream_writes": 0}
    try:
        with Server(settings, args.work / "server.log") as server:
            found, rates = asyncio.run(measured(server.address, schemas, args))
    except (ServerError, LoraplexError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    valid = found.valid()
    loaded = load_base("default", torch.bfloat16, args.cache)
    times = mask_times(loaded.directory / "tokenizer.json", loaded.weights.info, valid)
    shares = [one / other for one, other in zip(rates[True], rates[False], strict=True)]
    rows = [
        ["beside structured output", report.median(rates[True])],
        ["beside other requests", report.median(rates[False])],
        ["share", report.median(shares)],
        ["smallest share", min(shares)],
    ]
    print(report.table(["bystander", "tok/s"], rows))
    for schema, text in found.stopped:
        if (schema, text) not in valid:
            print(f"not valid: {json.dumps(schema)[:200]}: {text[:200]}")
    result = {
        "valid": len(valid),
        "of": len(found.stopped),
        "bystander_share": report.median(shares),
        "mask_us_p50": float(np.quantile(times, 0.5)),
        "mask_us_p99": float(np.quantile(times, 0.99)),
        "masks": len(times),
        "asked": found.asked,
        "rounds": args.rounds,
    }
    print(report.json_line(result))
    return 0 if len(valid) == len(found.stopped) else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure structured output of Loraplex.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench/structured"), help="folder for store and log")
    add("--rounds", type=int, default=9)
    add("--tokens", type=int, default=128, help="most tokens of an answer")
    add("--at-once", type=int, default=16, help="requests in flight while the corpus is asked")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
