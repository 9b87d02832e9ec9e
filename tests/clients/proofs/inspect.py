"""Inspect loads an adapter by its own code and finds it loaded: python inspect.py URL FILE ADAPTERS

ADAPTERS is a folder below the gateway's `--adapter-root` with the adapter `json`.
"""

import sys
from pathlib import Path

import httpx
from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.model._providers import _vllm_lora
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

URL = sys.argv[1]
ADAPTER = str(Path(sys.argv[3]) / "json")
BASE = "default"


class Failed(Exception):
    """An evaluation failed; the text says why."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise SystemExit(f"failed: {what}")


def answer(model: str) -> str:
    """What a model answers in an evaluation."""
    task = Task(
        dataset=[Sample(input="Anna is 31 years old and lives in Lyon.", target="Anna")],
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(max_tokens=32, temperature=0.0),
    )
    _vllm_lora._vllm_servers.clear()  # as in a new process: it asks the gateway what is loaded
    loaded = get_model(f"vllm/{model}", base_url=URL, api_key="x", memoize=False)
    (log,) = evaluate(task, model=loaded, display="none", log_dir="logs")
    if log.error is not None:
        raise Failed(log.error.message)
    return log.samples[0].output.completion


def listed() -> list[str]:
    return [model["id"] for model in httpx.get(f"{URL}/models").json()["data"]]


expect(ADAPTER not in listed(), "the adapter is not there before")
first = answer(f"{BASE}:{ADAPTER}")
expect(ADAPTER in listed(), "inspect has loaded the adapter, and it is named by its path")
expect(first != answer(BASE), "the adapter answers, not the base")

expect(answer(f"{BASE}:{ADAPTER}") == first, "a loaded adapter is used again")

root = URL.removesuffix("/v1")
gone = httpx.post(f"{root}/v1/unload_lora_adapter", json={"lora_name": ADAPTER})
expect(gone.status_code == 200 and ADAPTER not in listed(), "the adapter is unloaded")
expect(answer(f"{BASE}:{ADAPTER}") == first, "inspect loads it a second time")

try:
    answer(f"{BASE}:nobody")
except Failed as error:
    expect("nobody" in str(error), "a name that is not loaded is refused by its name")
else:
    raise SystemExit("failed: an adapter that does not exist is evaluated")
print("inspect: loaded, found, unloaded and loaded again")
