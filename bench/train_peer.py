"""PEFT's side of `bench/bench_train.py`, in a process of its own.

    python bench/train_peer.py --base var/bench/base --dtype float32 --attention sdpa

The base is NF4 with double quantisation by bitsandbytes, the adapter an all-linear LoRA, the
optimiser torch's fused AdamW (transformers' default), and the loss the model's own over all
positions. The last line of output is one JSON object.

With --recipe the model is prepared as in QLoRA's recipe (`prepare_model_for_kbit_training`). Its
relevant part is gradient checkpointing, which costs time and saves memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import report
import torch

RANK = 16
LR = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(directory: Path, dtype: torch.dtype, attention: str, recipe: bool) -> Any:
    """The model with an untrained adapter, ready for training."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        quantization_config=quantisation,
        device_map={"": "cpu"},
        attn_implementation=attention,
    )
    model.config.use_cache = False
    if recipe:
        reentrant = {"use_reentrant": False}
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=reentrant)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure training with PEFT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, default=Path("var/bench/base"), help="Hugging Face directory")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--attention", choices=("sdpa", "eager"), default="sdpa")
    add("--recipe", action="store_true")
    add("--rows", type=int, default=4)
    add("--tokens", type=int, default=256)
    add("--steps", type=int, default=3, help="timed steps, after one for warm-up")
    args = parser.parse_args(argv)

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = load(args.base, DTYPES[args.dtype], args.attention, args.recipe)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, fused=True
    )
    chance = torch.Generator().manual_seed(0)  # the tokens of train_ours.py
    ids = torch.randint(256, 49_000, (args.rows, args.tokens), generator=chance)
    seconds, losses = [], []
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    result = {
        "tok_s": ids.numel() / report.median(seconds[1:]),
        "seconds": seconds[1:],
        "first_loss": losses[0],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
    }
    print(report.json_line(result))
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
