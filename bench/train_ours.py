"""Our side of `bench/bench_train.py`, in a process of its own: one job, or four in one pass.

    python bench/train_ours.py single --base var/bench/base
    python bench/train_ours.py joint --base var/bench/base --tokens 64

The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import report
import torch
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops import build as kernels
from loraplex_model.ops import products as fast_products
from loraplex_training import methods
from loraplex_training.data.samples import IGNORED, MicroBatch
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.run.process_settings import keep_freed_memory
from loraplex_training.spec.spec import MethodSpec
from loraplex_training.step import memory
from loraplex_training.step.joint import JointPass, Part

RANK, JOBS = 16, 4
LR = 1e-4
PRODUCTS = {"float32": None, "bfloat16": torch.bfloat16}
AUTO = "auto"


class Job:
    """An all-linear LoRA adapter with AdamW."""

    def __init__(self, base: BaseWeights, seed: int, steps: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        setting = Setting(base, "base", chance, steps, lambda text: [])
        options = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
        self.adapter: TrainedAdapter = methods.make(MethodSpec("lora", options), setting)
        self.leaves = list(self.adapter.parameters.values())
        self.optimiser = torch.optim.AdamW(self.leaves, lr=LR, fused=True)

    @property
    def parameters(self) -> int:
        return sum(leaf.numel() for leaf in self.leaves)

    def step(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()

    def gradients(self) -> list[torch.Tensor]:
        """Returns the gradients and removes them from the parameters."""
        found = [leaf.grad for leaf in self.leaves]
        self.optimiser.zero_grad()
        assert all(gradient is not None for gradient in found)
        return [gradient for gradient in found if gradient is not None]


def examples(seed: int, rows: int, tokens: int) -> MicroBatch:
    """Random tokens; every token except the first of a row is learned."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, 49_000, (rows, tokens), generator=chance)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    starts = tuple(range(0, rows * tokens + 1, tokens))
    return MicroBatch(ids.reshape(-1), starts, targets.reshape(-1))


def train(passes: JointPass, jobs: Sequence[Job], batches: Sequence[MicroBatch]) -> list[float]:
    """Computes one optimiser step of all jobs in one pass. Returns their mean losses."""
    parts = [
        Part(job.adapter, batch, 1 / batch.learned)
        for job, batch in zip(jobs, batches, strict=True)
    ]
    sums = passes.backward(parts)
    for job in jobs:
        job.step()
    return [s / batch.learned for s, batch in zip(sums, batches, strict=True)]


def single(args: argparse.Namespace, base: BaseWeights) -> dict[str, object]:
    """Tokens per second and peak memory of one job."""
    passes = JointPass(base, checkpointing=args.checkpointing, products=PRODUCTS[args.products])
    job = Job(base, 0, args.steps)
    batch = examples(0, args.rows, args.tokens)
    first = train(passes, [job], [batch])[0]
    seconds = [timed(lambda: train(passes, [job], [batch])) for _ in range(args.steps)]
    size = memory.AdapterSize(job.parameters, ranks=7 * RANK)
    expected = memory.estimate(
        base, len(batch.tokens), [size], args.checkpointing, products=PRODUCTS[args.products]
    )
    return {
        "tok_s": len(batch.tokens) / report.median(seconds),
        "seconds": seconds,
        "first_loss": first,
        "peak_bytes": memory.peak_bytes(),
        "estimated_bytes": expected.total,
        "products_s": products(base, len(batch.tokens), dtype_of(args)),
    }


def joint(args: argparse.Namespace, base: BaseWeights) -> dict[str, object]:
    """Compares four jobs in one pass with the same four in turn."""
    passes = JointPass(base, checkpointing=args.checkpointing, products=PRODUCTS[args.products])
    jobs = [Job(base, seed, args.steps) for seed in range(JOBS)]
    batches = [examples(seed, 1, args.tokens) for seed in range(JOBS)]
    for job, batch in zip(jobs, batches, strict=True):  # B leaves zero, so that A has a gradient
        train(passes, [job], [batch])
    train(passes, jobs, batches)
    together, apart = [], []
    for _ in range(args.steps):
        together.append(timed(lambda: train(passes, jobs, batches)))
        pairs = list(zip(jobs, batches, strict=True))
        apart.append(timed(lambda: [train(passes, [job], [batch]) for job, batch in pairs]))  # noqa: B023
    tokens = JOBS * args.tokens
    return {
        "ratio": report.median(apart) / report.median(together),
        "together_tok_s": tokens / report.median(together),
        "apart_tok_s": tokens / report.median(apart),
        "together_seconds": together,
        "apart_seconds": apart,
        "grad_rel_difference": difference(passes, jobs, batches),
        "products_ratio": JOBS
        * products(base, args.tokens, dtype_of(args))
        / products(base, tokens, dtype_of(args)),
    }


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return PRODUCTS[args.products] or torch.float32


def products(base: BaseWeights, rows: int, dtype: torch.dtype) -> float:
    """Seconds of the products of this type, computed by torch, that a pass of so many rows needs.

    These are the products with every base matrix and with the head, forward and backward to their
    inputs, of dense matrices that exist already.
    """
    shapes = [matrix.shape for matrix in (base.layers[0].qkv, base.layers[0].o)]
    shapes += [matrix.shape for matrix in (base.layers[0].gate_up, base.layers[0].down)]
    head = tuple(base.lm_head.shape)
    total = 0.0
    for count, (out, width) in (*((len(base.layers), shape) for shape in shapes), (1, head)):
        weight, x = torch.randn(out, width).to(dtype), torch.randn(rows, width).to(dtype)
        y = x.new_empty(rows, out)
        repeats = range(max(1, 100_000_000 // (rows * out * width)))

        def both(x: torch.Tensor = x, y: torch.Tensor = y, weight: torch.Tensor = weight) -> None:
            torch.mm(x, weight.T, out=y)
            torch.mm(y, weight, out=x)

        both()
        x.fill_(1e-3)
        found = [timed(lambda: [both() for _ in repeats]) for _ in range(5)]  # noqa: B023
        total += count * min(found) / len(repeats)
    return total


def difference(passes: JointPass, jobs: Sequence[Job], batches: Sequence[MicroBatch]) -> float:
    """The largest |joint - alone| / |alone| of a parameter's gradient, at equal weights."""
    passes.backward([Part(job.adapter, b) for job, b in zip(jobs, batches, strict=True)])
    found = [job.gradients() for job in jobs]
    worst = 0.0
    for job, batch, mine in zip(jobs, batches, found, strict=True):
        passes.backward([Part(job.adapter, batch)])
        for one, other in zip(mine, job.gradients(), strict=True):
            worst = max(worst, float((one - other).norm() / other.norm()))
    return worst


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure training with Loraplex.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("case", choices=("single", "joint"))
    add("--base", type=Path, default=Path("var/bench/base"), help="Hugging Face directory")
    add("--cache", type=Path, default=Path("var/cache"))
    add("--rows", type=int, default=4, help="examples per step of the single job")
    add("--tokens", type=int, default=256, help="tokens per example")
    add("--steps", type=int, default=3, help="timed steps, after one for warm-up")
    add("--checkpointing", action="store_true")
    help_ = "type of matrix products; auto: as a run chooses it on this processor"
    add("--products", choices=(AUTO, *PRODUCTS), default=AUTO, help=help_)
    args = parser.parse_args(argv)
    keep_freed_memory()  # as a run does
    isa = kernels.load(directory=args.cache / "kernels").isa
    if args.products == AUTO:
        args.products = "bfloat16" if fast_products.available() else "float32"
    dtype = PRODUCTS[args.products] or torch.float32
    base = load_base(str(args.base), dtype, args.cache).weights
    result = single(args, base) if args.case == "single" else joint(args, base)
    facts = {"products": args.products, "isa": isa, "threads": torch.get_num_threads()}
    print(report.json_line({**result, **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
