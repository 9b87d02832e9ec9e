"""Runs vLLM for `vllm_cpu.py`; executed by the interpreter of vLLM's own environment.

    python vllm_worker.py '{"base": "/dir", "adapters": {"a0": "/dir"}, "max_rank": 16, ...}'

Reads JSON lines with jobs and prints JSON lines with timings until its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own output goes to the log
    adapters = settings["adapters"]
    import vllm
    from vllm import LLM

    lora = {
        "enable_lora": True,
        "max_loras": min(len(adapters), settings["rows"]),
        "max_lora_rank": settings["max_rank"],
        "max_cpu_loras": len(adapters),
    }
    llm = LLM(
        settings["base"],
        dtype="bfloat16",
        enable_prefix_caching=settings["prefix_cache"],
        max_model_len=max(2048, settings["context"]),
        max_num_seqs=max(64, settings["rows"]),  # the same for all cases: each setting is compiled
        disable_log_stats=False,  # their per-request times are read below
        **(lora if adapters else {}),
    )
    about = {"version": vllm.__version__, "dtype": "bfloat16", "lora": bool(adapters)}
    print(json.dumps({"peer": about}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"peer": answer(llm, adapters, json.loads(line))}), file=out, flush=True)


def answer(llm: Any, adapters: dict[str, str], message: dict[str, Any]) -> dict[str, object]:
    """Runs the jobs of a message as one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    numbers = {name: i + 1 for i, name in enumerate(adapters)}
    prompts, parameters, loras = [], [], []
    for name, ids, count in message["jobs"]:
        prompts.append({"prompt_token_ids": ids})
        parameters.append(
            SamplingParams(
                temperature=message["temperature"],
                top_p=message["top_p"],
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
            )
        )
        loras.append(LoRARequest(name, numbers[name], adapters[name]) if name else None)
    asked = {"lora_request": loras} if adapters else {}
    start = time.perf_counter()
    try:
        outputs = llm.generate(prompts, parameters, use_tqdm=False, **asked)
    except Exception as error:  # the parent shows it and ends
        return {"error": repr(error)}
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "answers": [timing(output) for output in outputs]}


def timing(output: Any) -> list[float | None]:
    """Tokens, seconds to the first, and seconds between two."""
    tokens, metrics = len(output.outputs[0].token_ids), output.metrics
    if metrics is None:
        return [tokens]
    step = (metrics.last_token_ts - metrics.first_token_ts) / (tokens - 1) if tokens > 1 else None
    return [tokens, metrics.first_token_latency, step]


if __name__ == "__main__":
    main()
