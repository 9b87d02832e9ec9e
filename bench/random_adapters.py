"""Writes random LoRA adapters of all linear layers for benchmarks, in PEFT's format.

    python bench/random_adapters.py --base var/bench/base --count 16 --rank 16

The adapters are named `a0`, `a1`, ... They have different numbers but equal cost, and their deltas
are small relative to the base's weights, so that the output remains text. Adapters that exist in
`--out` with the same settings are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write(
    base: Path,
    out: Path,
    count: int,
    rank: int,
    seed: int = 0,
    modules: Collection[str] | None = None,
) -> list[Path]:
    """Writes adapters for the Llama-like model in the Hugging Face directory `base`.

    `modules` names the linear layers; None selects all. The tensors are bfloat16 with alpha = rank;
    A is drawn as by PEFT, B from a normal distribution with standard deviation 0.002. Returns the
    directories.
    """
    return write_ranks(base, out, [rank] * count, modules, seed)


def write_ranks(
    base: Path,
    out: Path,
    ranks: Sequence[int],
    modules: Collection[str] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Writes an adapter for each rank, as `write` does. Returns the directories."""
    shapes, layers = _shapes(json.loads((base / "config.json").read_text()))
    if modules is not None:
        shapes = {path: shape for path, shape in shapes.items() if path.split(".")[1] in modules}
    directories = [out / f"a{i}" for i in range(len(ranks))]
    for i, (rank, directory) in enumerate(zip(ranks, directories, strict=True)):
        stamp = {"rank": str(rank), "seed": str(seed + i), "shapes": repr((layers, shapes))}
        if _stamp(directory) != stamp:
            _write_one(directory, shapes, layers, rank, stamp, str(base))
    return directories


def _write_one(
    directory: Path,
    shapes: dict[str, tuple[int, int]],
    layers: int,
    rank: int,
    stamp: dict[str, str],
    base: str,
) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(int(stamp["seed"]))
    tensors = {}
    for layer in range(layers):
        for module, (fan_in, fan_out) in shapes.items():
            bound = fan_in**-0.5
            a = (torch.rand(rank, fan_in, generator=generator) * 2 - 1) * bound
            b = torch.randn(fan_out, rank, generator=generator) * 0.002
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = b.to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(module.rpartition(".")[2] for module in shapes),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    unfinished = directory / "unfinished.safetensors"
    save_file(tensors, unfinished, metadata={"format": "pt", **stamp})
    unfinished.rename(directory / "adapter_model.safetensors")


def _shapes(config: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """`(in, out)` of each of MODULES, and the number of layers."""
    d, ff, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or d // heads
    q, kv = heads * head, config["num_key_value_heads"] * head
    sizes = [(d, q), (d, kv), (d, kv), (q, d), (d, ff), (d, ff), (ff, d)]
    return dict(zip(MODULES, sizes, strict=True)), config["num_hidden_layers"]


def _stamp(directory: Path) -> dict[str, str] | None:
    """The settings that the adapter in `directory` was made with; None if there is none."""
    from safetensors import safe_open

    weights = directory / "adapter_model.safetensors"
    if not weights.exists():
        return None
    with safe_open(weights, "pt") as file:
        return {key: value for key, value in file.metadata().items() if key != "format"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write random LoRA adapters for benchmarks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--base", type=Path, required=True, help="directory with config.json")
    parser.add_argument("--out", type=Path, default=Path("var/bench/adapters"))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for directory in write(args.base, args.out, args.count, args.rank, args.seed):
        print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
