"""Vectors of a real model in the engine: those of transformers and PEFT, the same bits alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from loraplex_adapters.store import Store
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import AdapterRef, SamplingParams, StepReport, Submit
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, build
from model.passes import token_ids
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model

from model import peft_oracle, tiny

VIRTUAL: Final = 5
LENGTHS: Final = (1, 16, 37)
KINDS: Final = ("base", "lora", "prompt")
POOLINGS: Final = ("last", "mean")

Key = tuple[str, int, str]
"""What computes a text, the text's length, and its pooling."""

KEYS: Final[list[Key]] = [(k, n, p) for k in KINDS for n in LENGTHS for p in POOLINGS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as PEFT writes them."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(7)
    configs = {
        "lora": LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
        ),
        "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL),
    }
    for name, config in configs.items():
        base = peft_oracle.quantised(checkpoint, torch.float32)
        get_peft_model(base, config).save_pretrained(root / name)
    return {name: root / name for name in configs}


@pytest.fixture(scope="module")
def expected(checkpoint: Path, folders: dict[str, Path]) -> dict[Key, np.ndarray]:
    found = {}
    for kind in KINDS:
        model: Any = peft_oracle.quantised(checkpoint, torch.float32)
        if kind != "base":
            model = PeftModel.from_pretrained(model, folders[kind]).eval()
        for length in LENGTHS:
            ids = torch.tensor([token_ids(length, length, tiny.VOCAB)])
            with torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            own = states[-length:].double()
            found[kind, length, "last"] = own[-1].numpy()
            found[kind, length, "mean"] = own.mean(0).numpy()
    return found


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> LocalRunner:
    return build(
        RunnerConfig(
            model=str(checkpoint),
            dtype="float32",
            device="cpu",
            threads=1,
            cache="var/cache",
            max_context=0,
            kv_tokens=1024,
            kv_memory=0,
            adapter_memory=1 << 22,
            max_rank=16,
            max_virtual_tokens=16,
            virtual_tokens=32,
        )
    )


@pytest.fixture(scope="module")
def refs(
    runner: LocalRunner, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[AdapterRef]]:
    store = Store(tmp_path_factory.mktemp("store"))
    found: dict[str, list[AdapterRef]] = {"base": []}
    for name, folder in folders.items():
        record, _ = store.register(name, folder, runner.info.base)
        found[name] = [AdapterRef(record.digest, str(store.path(record.digest)))]
    return found


def vectors(
    runner: LocalRunner,
    refs: dict[str, list[AdapterRef]],
    keys: list[Key],
    busy: bool = False,
    **limits: Any,
) -> dict[Key, np.ndarray]:
    """The raw vectors, computed by one engine; a `busy` one generates as well."""
    core = EngineCore(runner, EngineLimits(**limits))
    for number, (kind, length, pooling) in enumerate(keys):
        ids = token_ids(length, length, tiny.VOCAB)
        core.add(Submit(number, ids, 1, adapters=refs[kind], pooling=pooling))
        if busy:
            greedy = SamplingParams(temperature=0.0)
            other = token_ids(90 + number, 3 + number, tiny.VOCAB)
            held = refs[KINDS[number % 3]]
            core.add(Submit(1000 + number, other, 9, adapters=held, sampling=greedy))
    found = {}
    while not core.idle:
        for message in core.step():
            for output in message.outputs if isinstance(message, StepReport) else []:
                assert output.error is None
                if output.id < 1000:
                    found[keys[output.id]] = np.frombuffer(output.state, np.float32)
    core.check()
    for digest in list(core.adapters.slots.residents):
        runner.remove_adapter(core.adapters.slots.residents[digest].slot)
    return found


def test_vectors_are_those_of_transformers_and_peft(
    runner: LocalRunner, refs: dict[str, list[AdapterRef]], expected: dict[Key, np.ndarray]
) -> None:
    found = vectors(runner, refs, KEYS)
    assert found.keys() == expected.keys()
    for key, vector in found.items():
        np.testing.assert_allclose(vector, expected[key], rtol=1e-5, atol=3e-5, err_msg=str(key))
    different = [expected["base", 16, "last"], expected["lora", 16, "last"]]
    assert np.abs(different[0] - different[1]).max() > 1e-2, "the adapter changes nothing"


def test_a_vector_has_the_same_bits_alone_and_in_a_busy_engine(
    runner: LocalRunner, refs: dict[str, list[AdapterRef]]
) -> None:
    mixed = vectors(runner, refs, KEYS, busy=True, token_budget=11, max_running=7)
    for key in KEYS:
        alone = vectors(runner, refs, [key], prefix_cache=False)
        assert mixed[key].tobytes() == alone[key].tobytes(), key
