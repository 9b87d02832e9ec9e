"""Time that choosing the next tokens takes, by sampling parameters.

    .venv/bin/python bench/bench_sampling.py [--rows 64] [--vocab 49152] [--threads 2]

Prints the milliseconds of one step's sampling by the kernels, as the engine calls them, and with
numpy, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import numpy as np
from loraplex_model.decoder.sampling import NativeSampling
from loraplex_model.ops import build
from loraplex_server.engine.batching.sampler import Draw
from loraplex_server.engine.messages import SamplingParams
from loraplex_server.engine.passes.choices import Choices
from loraplex_server.engine.runner.sampling import NativeSampler

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


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times) * 1e3


def times(choices: Choices, logits: np.ndarray, repeats: int) -> dict[str, float]:
    """Milliseconds of one step by parameters."""
    rows, vocab = logits.shape
    lines, results = range(rows), {}
    for name, params in CASES.items():
        state = draws(params, rows, vocab)
        results[name] = milliseconds(
            lambda state=state: choices.choose(logits, lines, state), repeats
        )
    results["20 log-probabilities each"] = milliseconds(
        lambda: choices.logprobs(logits, lines, [5] * rows, [20] * rows), repeats
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="Rows of the step.")
    parser.add_argument("--vocab", type=int, default=49152, help="Size of the vocabulary.")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="Threads of the kernels."
    )
    options = parser.parse_args()
    shape = options.rows, options.vocab
    logits = (np.random.default_rng(0).standard_normal(shape) * 3).astype(np.float32)
    library = build.load()
    native = Choices(NativeSampler(NativeSampling(library, options.threads)))
    kernels, plain = times(native, logits, 20), times(Choices(None), logits, 3)
    print(f"{'':32} {'kernels':>11} {'numpy':>11}")
    for name, value in kernels.items():
        print(f"{name:32} {value:8.2f} ms {plain[name]:8.1f} ms")
    named = {"isa": library.isa, "threads": options.threads}
    sizes = {"rows": options.rows, "vocab": options.vocab}
    print(json.dumps({**sizes, **named, "milliseconds": kernels, "numpy_milliseconds": plain}))


if __name__ == "__main__":
    main()
