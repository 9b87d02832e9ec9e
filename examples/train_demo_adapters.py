"""Trains the two demo adapters, `pirate` and `json`, on the default model. Takes a few minutes.

    python examples/train_demo_adapters.py

Both learn in the same passes over one frozen NF4 base: rows grouped by adapter, through the decoder
that serves them. The examples are the questions and answers of `examples/data/answers.jsonl`, which
were written by hand for this. What is written to `examples/adapters/` are PEFT directories.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loraplex_model.adapter import LoraFactors, lora
from loraplex_model.config import DecoderConfig
from loraplex_model.forward import packed_logits
from loraplex_model.linear import DenseLinear
from loraplex_model.load import LoadedBase, load_base
from loraplex_model.mix import RowGroup
from loraplex_model.tokenizer import TOKENIZER, TokenizerInfo
from loraplex_model.weights import BaseWeights
from loraplex_server.text.chat import ChatTemplate
from safetensors.torch import save_file
from tokenizers import Tokenizer

HERE = Path(__file__).parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EPOCHS, BATCH = 3, 4  # 36 steps of 4 rows for each adapter
LEARNING_RATE, WARMUP_STEPS, CLIP = 2e-3, 5, 1.0
PARENTS = {"down_proj": "mlp", "gate_proj": "mlp", "up_proj": "mlp"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """An adapter to train: which modules, how, and on which answer of an example."""

    name: str
    rank: int
    modules: tuple[str, ...]

    @property
    def alpha(self) -> int:
        return 2 * self.rank


# Different ranks and modules, so that the demo's batch shows that they need not agree.
RECIPES = (
    Recipe("pirate", 8, ("q_proj", "v_proj", "o_proj")),
    Recipe("json", 4, ("q_proj", "v_proj", "down_proj")),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A tokenised example; only the completion, which ends with EOS, is learned."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def completion(name: str, example: dict[str, str]) -> str:
    """What the adapter `name` should say to the example's question."""
    if name == "json":
        return json.dumps({"topic": example["topic"], "answer": example["answer"]})
    return example[name]


def read_rows(base: LoadedBase, data: Path, name: str) -> list[Row]:
    """The examples, rendered by the base's chat template exactly as the server renders them."""
    info = TokenizerInfo.read(base.directory)
    tokenizer = Tokenizer.from_file(str(base.directory / TOKENIZER))
    if info.chat_template is None:
        raise SystemExit("error: the base model has no chat template")
    template = ChatTemplate(info.chat_template, info.special_tokens)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    rows = []
    for line in data.read_text("utf-8").splitlines():
        example = json.loads(line)
        prompt = template.render([{"role": "user", "content": example["question"]}])
        rows.append(
            Row(ids(prompt), (*ids(completion(name, example)), base.weights.eos_token_ids[0]))
        )
    return rows


def new_factors(
    recipe: Recipe, config: DecoderConfig, generator: torch.Generator
) -> dict[tuple[int, str], LoraFactors]:
    """LoRA's start (arXiv 2106.09685): A uniform as PEFT draws it, B zero; float32."""
    shapes = config.projection_shapes()
    factors = {}
    for layer in range(config.num_layers):
        for module in recipe.modules:
            fan_in, fan_out = shapes[module]
            a = (torch.rand(recipe.rank, fan_in, generator=generator) * 2 - 1) * fan_in**-0.5
            b = torch.zeros(fan_out, recipe.rank)
            factors[layer, module] = LoraFactors(
                a.requires_grad_(), b.requires_grad_(), recipe.alpha / recipe.rank
            )
    return factors


def losses(
    weights: BaseWeights,
    linear: DenseLinear,
    adapters: Sequence[dict[tuple[int, str], LoraFactors]],
    batches: Sequence[Sequence[Row]],
) -> list[torch.Tensor]:
    """Mean cross-entropy of each adapter's completions, all rows of all adapters in one pass."""
    tokens: list[int] = []
    starts = [0]
    groups, positions, targets = [], [], []
    for factors, rows in zip(adapters, batches, strict=True):
        first = len(tokens)
        predicting: list[int] = []
        for row in rows:
            predicting += range(
                len(tokens) + len(row.prompt) - 1,
                len(tokens) + len(row.prompt) + len(row.completion) - 1,
            )
            tokens += row.prompt + row.completion
            starts.append(len(tokens))
        groups.append(RowGroup(torch.arange(first, len(tokens)), ((lora(factors), 1.0),)))
        positions.append(predicting)
        targets.append([token for row in rows for token in row.completion])
    logits = packed_logits(weights, torch.tensor(tokens), starts, groups, linear)
    return [
        torch.nn.functional.cross_entropy(logits[at], torch.tensor(wanted))
        for at, wanted in zip(positions, targets, strict=True)
    ]


def batches_of(rows: Sequence[Row], rng: random.Random) -> Iterator[list[Row]]:
    """Every row once an epoch, in a new order each time; a last, smaller batch is dropped."""
    for _ in range(EPOCHS):
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def train(base: LoadedBase, data: Path, seed: int) -> list[dict[tuple[int, str], LoraFactors]]:
    """The factors of each recipe, trained side by side. Deterministic for one machine and seed."""
    weights = base.weights
    adapters = []
    optimisers = []
    streams = []
    for recipe in RECIPES:
        generator = torch.Generator().manual_seed(seed)
        factors = new_factors(recipe, weights.config, generator)
        adapters.append(factors)
        matrices = [matrix for lora in factors.values() for matrix in (lora.a, lora.b)]
        optimisers.append(torch.optim.AdamW(matrices, lr=LEARNING_RATE, weight_decay=0.0))
        streams.append(list(batches_of(read_rows(base, data, recipe.name), random.Random(seed))))
    steps = len(streams[0])
    linear = DenseLinear()
    began = time.monotonic()
    for step, batches in enumerate(zip(*streams, strict=True)):
        step_losses = losses(weights, linear, adapters, batches)
        torch.stack(step_losses).sum().backward()
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimiser in optimisers:
            [group] = optimiser.param_groups
            torch.nn.utils.clip_grad_norm_(group["params"], CLIP)
            group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        shown = "  ".join(
            f"{recipe.name} {loss.item():.3f}"
            for recipe, loss in zip(RECIPES, step_losses, strict=True)
        )
        print(
            f"step {step + 1:>2}/{steps}  loss: {shown}  {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return adapters


def write(
    directory: Path, recipe: Recipe, factors: dict[tuple[int, str], LoraFactors], fingerprint: str
) -> None:
    """A PEFT directory with bfloat16 weights, the type that a bfloat16 server computes with.

    `fingerprint` is the base's, or "" for none.
    """
    tensors = {}
    for (layer, module), m in factors.items():
        parent = PARENTS.get(module, "self_attn")
        prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
        for name, matrix in (("lora_A", m.a), ("lora_B", m.b)):
            tensors[f"{prefix}.{name}.weight"] = matrix.detach().to(torch.bfloat16).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(peft_config(recipe), indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(text + "\n", "utf-8")
    stamps = {"loraplex_base_fingerprint": fingerprint} if fingerprint else {}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt", **stamps})


def peft_config(recipe: Recipe) -> dict[str, Any]:
    """`adapter_config.json` as PEFT writes it, the modules in a fixed order."""
    from peft import LoraConfig

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.modules),
        base_model_name_or_path=BASE_NAME,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    return {**config, "target_modules": list(recipe.modules)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train the demo's two adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=HERE / "data" / "answers.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--cache", type=Path, default=Path("var/cache"), help="the server's cache")
    parser.add_argument("--threads", type=int, default=2, help="more helps only on idle cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stamp",
        action="store_true",
        help="write the base's fingerprint into the files: only that very base then takes them",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    base = load_base("default", torch.bfloat16, args.cache)
    fingerprint = base.weights.fingerprint if args.stamp else ""
    for recipe, factors in zip(RECIPES, train(base, args.data, args.seed), strict=True):
        write(args.out / recipe.name, recipe, factors, fingerprint)
        print(args.out / recipe.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
