"""A process in which adapters come and go while requests run: `churn.py MODEL FOLDER LOADS`.

A real model with 24 requests running at any time, 16 adapters of different sizes around 10 MB and
room for six. Prints one line of JSON for every eighth of the loads: how often an adapter was loaded
so far, the anonymous memory of the process, and the memory that is accounted for. The engine is
busy whenever a line is printed.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in the engine's process

import torch
from adapters.adapter_files import everywhere, lora_config, lora_tensors, write_adapter
from loraplex_adapters.store import Store
from loraplex_model.base.config import PROJECTIONS
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import AdapterRef, LoadDone, SamplingParams, StepReport, Submit
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, build
from transformers import AutoModelForCausalLM, LlamaConfig

ADAPTERS = 16
ROOM = 6
STREAMS = 24
LAYERS = 6
MOST_RANK = 220


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this system does not report anonymous memory")


def write_model(folder: Path) -> None:
    """A small model with a large vocabulary, whose logits take megabytes in every step."""
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def start(model: Path, folder: Path) -> LocalRunner:
    """The runner, with room for `ROOM` adapters on the device and two in host memory."""
    most = adapter_bytes(MOST_RANK)
    return build(
        RunnerConfig(
            model=str(model),
            dtype="float32",
            device="cpu",
            threads=1,
            cache=str(folder / "cache"),
            max_context=0,
            kv_tokens=4096,
            kv_memory=0,
            adapter_memory=ROOM * most,
            host_adapter_memory=2 * most,
            max_rank=MOST_RANK,
        )
    )


def adapter_bytes(rank: int) -> int:
    """Bytes of an adapter of a rank at every projection."""
    widths = 256 + 192 + 192 + 256 + 3 * 384
    return 4 * LAYERS * rank * widths


def registered(runner: LocalRunner, folder: Path) -> list[AdapterRef]:
    """Adapters of different sizes, in a store."""
    store, base, refs = Store(folder / "store"), runner.info.base, []
    for number in range(ADAPTERS):
        rank = MOST_RANK - 4 * number
        modules = everywhere(*PROJECTIONS, rank=rank, layers=LAYERS)
        config = lora_config(target_modules=list(PROJECTIONS), r=rank)
        tensors = {name: t * 0.01 for name, t in lora_tensors(modules, base, number).items()}
        source = write_adapter(folder / f"source-{number}", config, tensors)
        record, _ = store.register(f"adapter-{number}", source, base)
        refs.append(AdapterRef(record.digest, str(store.path(record.digest))))
    return refs


class Churn:
    """An engine that is kept busy, and the loads that it has done."""

    def __init__(self, runner: LocalRunner, refs: list[AdapterRef]) -> None:
        # With a prefix cache all blocks of the KV cache come into use, one after the other, and
        # the memory of those that were not in use at the start would count as growth.
        limits = EngineLimits(max_running=STREAMS, prefix_cache=False)
        self.core = EngineCore(runner, limits)
        self._refs = refs
        self._random = random.Random(5)
        self._number = 0
        self._open = 0
        self.loads = 0
        self.last: StepReport | None = None

    def step(self) -> None:
        """One step, before which finished requests are replaced."""
        while self._open < STREAMS:
            self._number += 1
            self._open += 1
            ref = self._random.choice(self._refs)
            prompt = [self._random.randrange(3, 30000) for _ in range(8)]
            sampling = SamplingParams(temperature=0.0)
            self.core.add(Submit(self._number, prompt, 6, [ref], sampling))
        for message in self.core.step():
            if isinstance(message, LoadDone):
                assert message.error is None, message.error
                self.loads += 1
            elif isinstance(message, StepReport):
                self.last = message
                for output in message.outputs:
                    assert output.error is None, output.error
                    self._open -= output.finish is not None


def main() -> None:
    model, folder, loads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if not model.exists():
        write_model(model)
    runner = start(model, folder)
    refs = registered(runner, folder)
    at_start = anonymous_bytes()
    churn = Churn(runner, refs)
    for part in range(1, 9):
        while churn.loads < loads * part // 8:
            churn.step()
        assert not churn.core.idle
        assert churn.last is not None
        stats = churn.last.stats
        report = {
            "loads": churn.loads,
            "memory": anonymous_bytes(),
            "accounted": at_start + stats.adapter_bytes + stats.host_bytes,
        }
        print(json.dumps(report), flush=True)
    os._exit(0)  # loader threads may still be reading


if __name__ == "__main__":
    main()
