"""Log-likelihoods that lm-eval has read from the gateway, beside those of PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path


class NoResults(Exception):
    """lm-eval wrote no samples."""


def samples(folder: Path) -> list[tuple[str, str, float, bool]]:
    """Context, continuation, log-likelihood and greediness of every sample. Raises NoResults."""
    found = []
    for file in sorted(folder.rglob("samples_*.jsonl")):
        if file.name.startswith("samples_written_"):
            continue  # generated answers
        for line in file.read_text("utf-8").splitlines():
            sample = json.loads(line)
            arguments = sample["arguments"]["gen_args_0"]
            ((logprob, greedy),) = sample["filtered_resps"]
            found.append((arguments["arg_0"], arguments["arg_1"], float(logprob), _truth(greedy)))
    if not found:
        raise NoResults(f"{folder} has no samples")
    return found


def largest_difference(folder: Path, base: Path, adapter: Path) -> float:
    """The largest difference of a log-likelihood; infinite if a greediness differs."""
    from loraplex_model.ops.quiet import quieten_bitsandbytes

    told = samples(folder)
    quieten_bitsandbytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        from clients.reference import Reference  # seconds, and only for this client

        ours = Reference(base, adapter).of([(context, rest) for context, rest, _, _ in told])
    worst = 0.0
    for (_, _, logprob, greedy), one in zip(told, ours, strict=True):
        worst = max(worst, abs(logprob - one.logprob))
        if greedy is not one.is_greedy:
            return float("inf")
    return worst


def _truth(value: object) -> bool:
    return value is True or str(value).lower() == "true"
