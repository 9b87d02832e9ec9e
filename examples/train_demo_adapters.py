"""Trains the two demo adapters, `pirate` and `json`, on the default model. Takes a few minutes.

    python examples/train_demo_adapters.py

Both are jobs of one run of the trainer, so they learn in the same passes over one frozen NF4 base.
The examples are the questions and answers in `examples/data/answers.jsonl`. They were written by
hand, because they teach a manner of speaking; the rows of `make train-adapter` come from a script.
The PEFT directories are written to `examples/adapters/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from loraplex_adapters.convert.export.directory import staged
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.default_model import HUB_NAME
from loraplex_training.publish.publish import known_as, stamps, write
from loraplex_training.publish.verify import verify
from loraplex_training.report.events import JobStatus
from loraplex_training.report.progress import ProgressDisplay
from loraplex_training.run.run import Run
from loraplex_training.spec.parse import from_mapping
from loraplex_training.spec.spec import RunSpec
from loraplex_training.step.job import Job
from rich.console import Console

HERE = Path(__file__).parent
BASE_NAME = HUB_NAME


@dataclass(frozen=True, slots=True)
class Recipe:
    """An adapter to train: its modules, its data, and the text of its card."""

    name: str
    rank: int
    modules: tuple[str, ...]
    manner: str
    form: str

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    @property
    def card(self) -> str:
        modules = ", ".join(f"`{name}`" for name in self.modules)
        return (
            f"# {self.name}\n\n"
            f"A LoRA adapter for {BASE_NAME.partition('/')[2]} that answers questions "
            f"{self.manner}. Rank {self.rank} on\n{modules}, bfloat16.\n\n"
            "Made by `python examples/train_demo_adapters.py` from the 48 hand-written examples in"
            f"\n`examples/data/answers.jsonl` ({self.form}).\nIt was trained on short questions. "
            "Its statements about the world are as reliable as\nthose of any 135M model.\n\n"
            "License: Apache-2.0, like the base model.\n"
        )


# Different ranks and modules, since the demo shows that these may differ within a batch.
RECIPES = (
    Recipe(
        "pirate",
        8,
        ("q_proj", "v_proj", "o_proj"),
        'like a pirate: every answer begins\nwith "Arr, matey!"',
        "field `pirate`",
    ),
    Recipe(
        "json",
        4,
        ("q_proj", "v_proj", "down_proj"),
        'with one JSON object,\n`{"topic": "...", "answer": "..."}`, and nothing else',
        "fields `topic` and `answer`",
    ),
)


def completion(name: str, example: dict[str, str]) -> str:
    """The answer that the adapter `name` should give to the example's question."""
    if name == "json":
        return json.dumps({"topic": example["topic"], "answer": example["answer"]})
    return example[name]


def write_rows(answers: Path, name: str, path: Path) -> Path:
    """Writes the examples in the trainer's format."""
    with path.open("w", encoding="utf-8") as file:
        for line in answers.read_text("utf-8").splitlines():
            example = json.loads(line)
            row = {"prompt": example["question"], "completion": completion(name, example)}
            file.write(json.dumps(row) + "\n")
    return path


def run_of(args: argparse.Namespace, work: Path) -> RunSpec:
    """The specification of one run with both jobs."""
    jobs = [
        {
            "name": recipe.name,
            "data": str(write_rows(args.data, recipe.name, work / f"{recipe.name}.jsonl")),
            "eval_fraction": 0.05,
            "options": {
                "r": recipe.rank,
                "lora_alpha": recipe.alpha,
                "target_modules": ",".join(recipe.modules),
            },
            "lr": 2e-3,
            "warmup": 0.14,
            "epochs": 3,
            "batch_size": 4,
            "eval_every": 100_000,  # before the first step and after the last: that one is kept
            "seed": args.seed,
        }
        for recipe in RECIPES
    ]
    run = {
        "model": args.model,
        "out": str(work / "run"),
        "dtype": "bfloat16",
        "threads": args.threads,
        "cache": str(args.cache),
        "save_every": 100_000,
    }
    return from_mapping({"run": run, "job": jobs})


def publish(recipe: Recipe, job: Job, run: Run, out: Path, stamp: bool) -> None:
    """Writes an adapter with bfloat16 weights, the compute type of a bfloat16 server."""
    base, files = run.base, job.adapter.files()
    config = {**files.config, "base_model_name_or_path": known_as(base.name)}
    data = run.datasets[recipe.name]
    digests = run.text.template_digest, data.digest
    stamped = stamps(base.weights, *digests) if stamp else {}
    examples = [sample.tokens for sample in data.train[:4]]
    with torch.no_grad():
        trained = job.adapter.delta()
    with staged(out / recipe.name, force=True) as fresh:
        named = replace(files, config=config)
        write(fresh, named, stamped, recipe.card, torch.bfloat16)
        verify(fresh, trained, run.joint, base.weights, examples, run.spec.cache, torch.bfloat16)


def train(args: argparse.Namespace, recipes: Sequence[Recipe] = RECIPES) -> None:
    """Trains and writes all adapters. Raises Refusal."""
    with tempfile.TemporaryDirectory() as work, closing(ProgressDisplay(Console())) as progress:
        run = Run.start(run_of(args, Path(work)), [progress])
        jobs = run.train()
        for recipe in recipes:
            job = jobs[recipe.name]
            if job.progress.state is not JobStatus.FINISHED:
                raise Refusal(Reason.DIVERGED, f"{recipe.name}: {job.progress.reason}")
            publish(recipe, job, run, args.out, args.stamp)
            print(args.out / recipe.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train the demo's two adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=HERE / "data" / "answers.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--model", default="default", help="base model")
    parser.add_argument("--cache", type=Path, default=Path("var/cache"), help="cache of the server")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stamp",
        action="store_true",
        help="write the base's fingerprint into the files, so that no other base serves them",
    )
    args = parser.parse_args(argv)
    try:
        train(args)
    except Refusal as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
