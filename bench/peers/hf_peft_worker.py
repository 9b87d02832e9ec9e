"""Runs PEFT for `hf_peft.py`: reads JSON lines with jobs and prints JSON lines with timings.

python hf_peft_worker.py '{"base": "/dir", "dtype": "best", "adapters": {"a0": "/dir"}, ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import peft_peer
import torch


def main() -> None:
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    base, adapters = Path(settings["base"]), settings["adapters"]
    dtype, probes = settings["dtype"], {}
    with torch.inference_mode():
        if dtype == "best":
            dtype, probes = peft_peer.faster_dtype(base, "cpu")
        model = peft_peer.load_base(base, peft_peer.DTYPES[dtype], "cpu")
        if adapters:
            model = peft_peer.load_adapters(model, [Path(path) for path in adapters.values()])
        import peft

        about = {"version": peft.__version__, "dtype": dtype, "probes_tok_s": probes or None}
        print(json.dumps({"peer": about}), file=out, flush=True)
        for line in sys.stdin:
            told = answer(model, bool(adapters), json.loads(line))
            print(json.dumps({"peer": told}), file=out, flush=True)


def answer(model: Any, has_adapters: bool, message: dict[str, Any]) -> dict[str, object]:
    """Runs the jobs, whose prompts and answers have one length each, as one batch."""
    names, prompts, counts = zip(*message["jobs"], strict=True)
    if len(set(map(len, prompts))) > 1 or len(set(counts)) > 1:
        return {"error": "PEFT is measured with prompts and answers of one length"}
    ids = torch.tensor(prompts)
    sampled = message["temperature"] > 0
    drawn = {"temperature": message["temperature"], "top_p": message["top_p"], "top_k": 0}
    start = time.perf_counter()
    given = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=counts[0],
        do_sample=sampled,
        pad_token_id=0,
        **(drawn if sampled else {}),
        **({"adapter_names": [name or "__base__" for name in names]} if has_adapters else {}),
    )
    seconds = time.perf_counter() - start
    tokens = given.shape[1] - ids.shape[1]
    return {"seconds": seconds, "answers": [[tokens]] * len(prompts)}


if __name__ == "__main__":
    main()
