"""Time that choosing the next tokens takes, by sampling parameters.

    .venv/bin/python bench/bench_sampling.py [--rows 64] [--vocab 49152]

Prints the milliseconds of one step's sampling on the engine's thread, without turns, and last one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from loraplex_server.engine.batching.sampler import Draw, logprobs, sample
from loraplex_server.engine.messages import SamplingParams

PROMPT_TOKENS = 1000
CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 0.7, top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95),
    "and repetition penalty 1.5": SamplingParams(
        temperature=0.7, top_p=0.95, repetition_penalty=1.5
    ),
    "temperature 1, top_k 50": SamplingParams(temperature=1.0, top_k=50),
    "temperature 100, top_p 0.999": SamplingParams(temperature=100.0, top_p=0.999),
    "and all penalties": SamplingParams(
        temperature=100.0,
        top_p=0.999,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=1.0,
    ),
}


def draws(params: SamplingParams, rows: int, vocab: int) -> list[Draw]:
    """The state of `rows` requests with a prompt and some output."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(rows):
        draw = Draw(params, rng.integers(0, vocab, PROMPT_TOKENS).tolist())
        for token in rng.integers(0, vocab, 100).tolist():
            draw.saw(token)
        made.append(draw)
    return made


def milliseconds(run: object, repeats: int = 5) -> float:
    """The fastest of some runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()  # type: ignore[operator]
        times.append(time.perf_counter() - begun)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="Rows of the step.")
    parser.add_argument("--vocab", type=int, default=49152, help="Size of the vocabulary.")
    options = parser.parse_args()
    shape = options.rows, options.vocab
    logits = (np.random.default_rng(0).standard_normal(shape) * 3).astype(np.float32)
    results = {}
    for name, params in CASES.items():
        state = draws(params, options.rows, options.vocab)
        results[name] = milliseconds(lambda state=state: sample(logits, state))
    results["20 log-probabilities each"] = milliseconds(
        lambda: [logprobs(line, 5, 20) for line in logits]
    )
    for name, value in results.items():
        print(f"{name:32} {value:8.1f} ms")
    print(json.dumps({"rows": options.rows, "vocab": options.vocab, "milliseconds": results}))


if __name__ == "__main__":
    main()
