"""Measures the same workload with PEFT: transformers, bitsandbytes and peft on this machine.

    python bench/peft_peer.py --base var/bench/base --adapters var/bench/adapters --dtype best

The base is NF4 with double quantisation. Sixteen rows share one `generate` call whose
`adapter_names` gives the adapter of each row. Prompts are random tokens of one length; decoding is
greedy and does not stop at the end-of-sequence token. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch

CASES = ("base_1", "base_16", "adapter_1", "adapters_16")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Generate = Callable[[int, int, int], None]
"""`generate(rows, prompt tokens, new tokens)`."""


def load_base(directory: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=quantisation, device_map={"": device}
    )
    model.generation_config.eos_token_id = None  # rows end at max_new_tokens only
    return model.eval()


def load_adapters(base: Any, directories: list[Path]) -> Any:
    """The base wrapped by PEFT, with the adapter of each directory under its folder's name."""
    from peft import PeftModel

    first, *others = directories
    model = PeftModel.from_pretrained(base, first, adapter_name=first.name)
    for directory in others:
        model.load_adapter(directory, adapter_name=directory.name)
    return model.eval()


def generator(model: Any, seed: int, adapter_names: list[str] | None) -> Generate:
    """Returns a function that generates greedily from new random prompts."""
    random = torch.Generator().manual_seed(seed)
    names = {"adapter_names": adapter_names} if adapter_names else {}

    def generate(rows: int, prompt_tokens: int, new_tokens: int) -> None:
        ids = torch.randint(256, 49_000, (rows, prompt_tokens), generator=random).to(model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **names,
        )
        if out.shape != (rows, prompt_tokens + new_tokens):
            raise RuntimeError(f"generate returned {tuple(out.shape)}")

    return generate


def tokens_per_second(
    generate: Generate, rows: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> float:
    """Output tokens over the time of the whole call, including prefill; the median of `repeats`."""
    generate(rows, 8, 2)  # warm-up
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        generate(rows, prompt_tokens, new_tokens)
        rates.append(rows * new_tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def faster_dtype(directory: Path, device: str) -> tuple[str, dict[str, float]]:
    """Name of the faster type, and tokens per second of each, from short runs."""
    rates = {}
    for name, dtype in DTYPES.items():
        generate = generator(load_base(directory, dtype, device), seed=0, adapter_names=None)
        rates[name] = tokens_per_second(generate, 16, 16, 4, repeats=1)
    return max(rates, key=lambda name: rates[name]), rates


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rates: dict[str, float] = {}
    probes: dict[str, float] = {}
    name = args.dtype
    directories = [args.adapters / f"a{i}" for i in range(16)]
    with torch.inference_mode():
        if name == "best":
            name, probes = faster_dtype(args.base, args.device)
        model = load_base(args.base, DTYPES[name], args.device)
        for case, rows in (("base_1", 1), ("base_16", 16)):
            if case in args.cases:
                generate = generator(model, args.seed, None)
                rates[case] = _measure(args, generate, rows)
        if {"adapter_1", "adapters_16"} & set(args.cases):
            model = load_adapters(model, directories)
        for case, rows in (("adapter_1", 1), ("adapters_16", 16)):
            if case in args.cases:
                names = [directory.name for directory in directories[:rows]]
                generate = generator(model, args.seed, names)
                rates[case] = _measure(args, generate, rows)
    print(
        f"PEFT, {name}, {torch.get_num_threads()} threads, "
        f"{args.prompt_tokens} prompt tokens, {args.output_tokens} new tokens"
    )
    print(report.table(["case", "output tok/s"], [[case, rate] for case, rate in rates.items()]))
    settings = {
        "dtype": name,
        "dtype_probe_tok_s": probes or None,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "threads": torch.get_num_threads(),
    }
    print(report.json_line({**rates, **settings}))
    return 0


def _measure(args: argparse.Namespace, generate: Generate, rows: int) -> float:
    return tokens_per_second(generate, rows, args.prompt_tokens, args.output_tokens, args.repeats)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure PEFT with the benchmark workload.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, default=Path("var/bench/base"), help="Hugging Face directory")
    add("--adapters", type=Path, default=Path("var/bench/adapters"), help="folder with a0 to a15")
    add(
        "--dtype",
        choices=[*DTYPES, "best"],
        default="best",
        help="best: the faster of the two",
    )
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--repeats", type=int, default=1)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
