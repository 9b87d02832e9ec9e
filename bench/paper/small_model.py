"""The small model on which the papers' claims are tested; made in about a minute and cached.

A byte-level Llama, pretrained on the sources of the Python standard library and quantised to NF4 by
the server's own conversion. The adapters learn C++ from torch's own headers. Both texts exist on
every machine that can run this.

    PYTHONPATH=bench python -m paper.small_model      (the benchmarks run it if needed)
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_training.data.samples import IGNORED, MicroBatch
from report import json_line
from transformers import LlamaConfig, LlamaForCausalLM

HOME = Path("var/bench/paper")
CONTEXT = 128
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STEPS, BATCH, RATE = 500, 8, 2e-3


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes of many files in a shuffled order, with a tenth of the files held out. uint8 [n]."""

    train: torch.Tensor
    evaluation: torch.Tensor

    @staticmethod
    def of(files: Sequence[Path], limit: int) -> Text:
        """At most `limit` bytes of the files; a tenth of the *files* is for evaluation."""
        order = sorted(files, key=lambda path: (path.name, str(path)))
        random.Random(0).shuffle(order)
        cut = max(1, len(order) // 10)
        return Text(_bytes(order[cut:], limit), _bytes(order[:cut], limit // 10))

    @property
    def digest(self) -> str:
        """SHA-256 of the training text."""
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()


def _bytes(files: Sequence[Path], limit: int) -> torch.Tensor:
    data = b"\n".join(path.read_bytes() for path in files)[:limit]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def python_text() -> Text:
    """The top-level modules of the standard library."""
    return Text.of(list(Path(sysconfig.get_path("stdlib")).glob("*.py")), 8_000_000)


def cpp_text() -> Text:
    """The headers of c10, which are part of every torch wheel."""
    include = Path(torch.__file__).parent / "include/c10"
    return Text.of(list(include.rglob("*.h")), 1_500_000)


def windows(text: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """`count` pieces of the text at random positions, int64 [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts]).long()


def micro_batch(pieces: torch.Tensor) -> MicroBatch:
    """Pieces [S, length] as examples in which every byte except the first is learned."""
    targets = torch.cat([pieces[:, 1:], torch.full((len(pieces), 1), IGNORED)], 1)
    starts = tuple(range(0, pieces.numel() + 1, pieces.shape[1]))
    return MicroBatch(pieces.reshape(-1), starts, targets.reshape(-1))


def checkpoint() -> Path:
    """Returns the pretrained model as a Hugging Face directory; makes it if it is missing."""
    text = python_text()
    recipe = json.dumps([SHAPE, CONTEXT, STEPS, BATCH, RATE, text.digest, torch.__version__])
    directory = HOME / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not directory.exists():
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _pretrained(text).save_pretrained(unfinished)
        unfinished.rename(directory)
    return directory


def base() -> BaseWeights:
    """The pretrained model as the server loads it: NF4 with double quantisation."""
    return load_base(str(checkpoint()), torch.float32, HOME / "cache").weights


def model() -> LlamaForCausalLM:
    """The pretrained model in float32, as a transformers model."""
    return LlamaForCausalLM.from_pretrained(checkpoint()).eval()


def loss(model: LlamaForCausalLM, pieces: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of every byte except the first of each piece [S, length]."""
    logits = model(pieces[:, :-1]).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, pieces[:, 1:].flatten(), reduction=reduction)


def _pretrained(text: Text) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.1)
    for step in range(STEPS):
        if step % 100 == 0:
            print(f"pretraining: step {step} of {STEPS}", file=sys.stderr, flush=True)
        loss(model, windows(text.train, BATCH, CONTEXT, step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model


def main() -> int:
    """Makes the model and prints its losses."""
    start = time.perf_counter()
    made = model()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        losses = {
            name: float(loss(made, windows(text.evaluation, 96, CONTEXT, 0)))
            for name, text in (("python", python_text()), ("cpp", cpp_text()))
        }
    weights = sum(p.numel() for p in made.parameters())
    print(json_line({"weights": weights, "seconds": seconds, "loss": losses}))
    return 0 if losses["python"] < 0.6 * math.log(256) else 1


if __name__ == "__main__":
    sys.exit(main())
