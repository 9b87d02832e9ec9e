"""PEFT on transformers and bitsandbytes, from the project's own environment.

The base is NF4 with double quantisation. The rows of a run share one `generate` call, with
`adapter_names` for the adapters of the rows; base rows are measured without PEFT around the model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peers.face import Fleet
from peers.worker import WorkerEngine, fleet_settings

VARIABLE = "LORAPLEX_PEER_PEFT"
WORKER = Path(__file__).with_name("hf_peft_worker.py")


class Peft:
    """PEFT's `adapter_names`, in the faster of float32 and bfloat16."""

    name = "peft"
    most_adapters = 64

    def __init__(self, base: Path, dtype: str = "best") -> None:
        """`dtype` is float32, bfloat16, or best: the faster one, which the first engine finds out.

        `LORAPLEX_PEER_PEFT` may name the interpreter of another environment.
        """
        self._base = base
        self._dtype = dtype
        self._python = os.environ.get(VARIABLE) or sys.executable

    def open(self, fleet: Fleet, log: Path) -> WorkerEngine:
        settings = {
            "base": str(self._base.resolve()),
            "dtype": self._dtype,
            **fleet_settings(fleet),
        }
        cores = str(len(os.sched_getaffinity(0)))
        env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": cores}
        command = [self._python, str(WORKER), json.dumps(settings)]
        engine = WorkerEngine(self.name, command, log, env)
        self._dtype = str(engine.about["dtype"])
        return engine
