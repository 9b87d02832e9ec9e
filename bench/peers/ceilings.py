"""What the machine allows: rates of arithmetic and memory, and the shortest time of a phase."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peers.face import PeerError

SOURCE = Path(__file__).with_name("ceiling.cpp")
NF4_BYTES = 0.5 + 4 / 64
"""Bytes of one weight: four bits, and a float32 maximum for 64 weights."""


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic operations and bytes read of one phase."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-like base model: weights of all layers, of the head, and the cache."""

    layer_weights: int
    head_weights: int
    layers: int
    q_size: int
    kv_size: int

    @classmethod
    def of(cls, config: Mapping[str, int]) -> Shape:
        """From the `config.json` of a Hugging Face directory."""
        d, ff, layers = (
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
        )
        head = config.get("head_dim") or d // config["num_attention_heads"]
        q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        weights = layers * (d * (q + 2 * kv) + q * d + 3 * d * ff)
        return cls(weights, d * config["vocab_size"], layers, q, kv)

    def decode(self, rows: int, context: int) -> Work:
        """One step of `rows` rows whose sequences have `context` tokens each."""
        attention = 4 * self.layers * self.q_size * context
        flops = rows * (2 * (self.layer_weights + self.head_weights) + attention)
        cache = rows * context * self.layers * 2 * self.kv_size * 2
        return Work(flops, self.layer_weights * NF4_BYTES + self.head_weights * 2 + cache)

    def prefill(self, prompts: int, tokens: int, steps: int) -> Work:
        """`prompts` prompts of `tokens` each, in `steps` steps, each of which reads the weights."""
        attention = 4 * self.layers * self.q_size * tokens * (tokens + 1) / 2
        per_prompt = 2 * (tokens * self.layer_weights + self.head_weights) + attention
        weights = self.layer_weights * NF4_BYTES + self.head_weights * 2
        return Work(prompts * per_prompt, steps * weights)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates. `products` has GFLOP/s by instruction, and of torch's bfloat16 product."""

    products: Mapping[str, float]
    read_gb_s: float

    @property
    def gflops(self) -> float:
        return max(self.products.values())

    def seconds(self, work: Work) -> float:
        """The shortest time of the work: that of its arithmetic or of its reads."""
        return max(work.flops / self.gflops, work.bytes / self.read_gb_s) / 1e9


def measure(work: Path, step_bytes: int) -> Ceilings:
    """Compiles and runs the probe, and times torch's product. Raises PeerError.

    `step_bytes` is the size of the smaller buffer: if it fits into a cache, its rate is the limit.
    """
    program = _compiled(work)
    cores = len(os.sched_getaffinity(0))
    command = [str(program), str(step_bytes)]
    env = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False)
    if done.returncode:
        raise PeerError(f"the probe of the ceilings ended with exit code {done.returncode}")
    told = json.loads(done.stdout)
    read = max(told.pop("read_large_gb_s"), told.pop("read_step_gb_s"))
    told.pop("threads")
    return Ceilings({**told, "torch_bf16": _torch_gflops(cores)}, read)


def _compiled(work: Path) -> Path:
    program = work / "ceiling"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        work.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-march=native", "-fopenmp", "-o", str(program), str(SOURCE)]
        done = subprocess.run([os.environ.get("CXX", "c++"), *flags], check=False)
        if done.returncode:
            raise PeerError("the probe of the ceilings does not compile; see above")
    return program


def _torch_gflops(threads: int, size: int = 2048, seconds: float = 1.0) -> float:
    """The highest rate of torch's bfloat16 product of two square matrices."""
    import torch

    torch.set_num_threads(threads)
    a = torch.randn(size, size).bfloat16()
    torch.matmul(a, a)
    end, best = time.perf_counter() + seconds, float("inf")
    while (start := time.perf_counter()) < end:
        torch.matmul(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
