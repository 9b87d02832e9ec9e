"""The real runner: what it falls back to, what it refuses, and that one bad row fails alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.adapter_files import everywhere, lora_config, lora_tensors, write_adapter
from loraplex_adapters.store import Store
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.refusal import Refusal
from loraplex_model.ops import build as kernels
from loraplex_server.engine.adapters.loader import LoaderResult, LoaderTask
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import AdapterRef, Output, SamplingParams, StepReport, Submit
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, build

from model import tiny

PROMPT = ForwardBatch.build([([1, 5, 9, 4], 0, [0], ())])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("model"))


def start(checkpoint: Path, cache: Path, **changes: object) -> LocalRunner:
    settings: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "cache": str(cache),
        "max_context": 0,
        "kv_tokens": 512,
        "kv_memory": 0,
        "adapter_memory": 1 << 20,
        "max_rank": 16,
    }
    return build(RunnerConfig(**(settings | changes)))


def test_without_a_compiler_one_warning_and_the_same_answers(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled = start(checkpoint, Path("var/cache"))
    assert compiled.info.kernels.startswith("C++")
    assert compiled.launch is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "_loaded", {})  # as in a new process
    with caplog.at_level(logging.WARNING):
        fallback = start(checkpoint, tmp_path)
    assert fallback.info.kernels == "torch"
    ours = [r for r in caplog.records if r.name.startswith("loraplex_")]
    (warning,) = [r for r in ours if "kernels" in r.getMessage()]
    assert "install g++" in warning.getMessage()
    torch.testing.assert_close(
        fallback.forward(PROMPT), compiled.forward(PROMPT), rtol=1e-4, atol=1e-4
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused_with_what_to_do(checkpoint: Path) -> None:
    with pytest.raises(Refusal, match="--device cpu") as refused:
        start(checkpoint, Path("var/cache"), device="cuda")
    assert refused.value.reason == "NO_CUDA"


def test_a_cache_smaller_than_a_block_is_refused(checkpoint: Path) -> None:
    with pytest.raises(Refusal, match="kv_memory") as refused:
        start(checkpoint, Path("var/cache"), kv_tokens=0, kv_memory=1000)
    assert refused.value.reason == "KV_TOO_SMALL"


def registered(runner: LocalRunner, folder: Path) -> AdapterRef:
    """A random adapter on two modules, in a store."""
    base = runner.info.base
    modules = everywhere("q_proj", "down_proj", layers=3)
    source = write_adapter(
        folder / "source",
        lora_config(target_modules=["q_proj", "down_proj"], r=4),
        lora_tensors(modules, base),
    )
    store = Store(folder / "store")
    record, _ = store.register("one", source, base)
    return AdapterRef(record.digest, str(store.path(record.digest)))


def test_an_adapter_of_the_store_changes_its_rows_and_no_others(
    checkpoint: Path, tmp_path: Path
) -> None:
    runner = start(checkpoint, Path("var/cache"))
    before = runner.forward(PROMPT).clone()
    loaded = runner.read_adapter(registered(runner, tmp_path))
    runner.publish_adapter(0, loaded, [])
    mixed = runner.forward(
        ForwardBatch.build([([1, 5, 9, 4], 0, [0], ()), ([1, 5, 9, 4], 0, [1], ((0, 1.0),))])
    )
    assert torch.equal(mixed[0], before[0])
    assert not torch.allclose(mixed[1], before[0], atol=1e-3)
    runner.remove_adapter(0)
    assert torch.equal(runner.forward(PROMPT), before)


def test_bytes_that_changed_in_the_store_are_not_loaded(checkpoint: Path, tmp_path: Path) -> None:
    runner = start(checkpoint, Path("var/cache"))
    ref = registered(runner, tmp_path)
    weights = Path(ref.path) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Refusal) as refused:
        runner.read_adapter(ref)
    assert refused.value.reason == "ADAPTER_CORRUPT"


class ReadsAtOnce:
    """A loader without a thread; the adapter named `bad` is read full of NaN."""

    def __init__(self, runner: LocalRunner, good: str) -> None:
        self.runner, self.good = runner, good
        self.results: list[LoaderResult] = []
        self.lanes = 2

    def start(self, task: LoaderTask) -> None:
        loaded = self.runner.read_adapter(AdapterRef(self.good, task.ref.path))
        if task.ref.digest != self.good:
            loaded.packed.data.view(torch.float32).fill_(float("nan"))
        self.results.append(LoaderResult(task, loaded))

    def poll(self) -> LoaderResult | None:
        return self.results.pop() if self.results else None


def test_an_adapter_with_nan_in_it_fails_its_own_rows_only(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Validation refuses such a file; here one is forced past it."""
    good = registered(start(checkpoint, Path("var/cache")), tmp_path)
    bad = AdapterRef("sha256:" + "0" * 64, good.path)

    def run(requests: dict[int, list[AdapterRef]]) -> dict[int, list[Output]]:
        runner = start(checkpoint, Path("var/cache"))
        core = EngineCore(runner, loader=ReadsAtOnce(runner, good.digest))
        for number, adapters in requests.items():
            greedy = SamplingParams(temperature=0.0)
            core.add(Submit(number, [1, 5, 9, 4], 6, adapters, greedy, logprobs=0))
        outputs: dict[int, list[Output]] = {number: [] for number in requests}
        for _ in range(30):
            for message in core.step():
                for output in message.outputs if isinstance(message, StepReport) else []:
                    outputs[output.id].append(output)
        return outputs

    together = run({1: [], 2: [good], 3: [bad]})
    assert [output.error.reason for output in together[3] if output.error] == ["NON_FINITE_LOGITS"]
    for number, adapters in ((1, []), (2, [good])):
        answer = [(o.token_ids, o.logprobs) for o in together[number]]
        assert answer == [(o.token_ids, o.logprobs) for o in run({number: adapters})[number]]
        assert len(answer) == 6
