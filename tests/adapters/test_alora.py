"""Activated LoRA through the whole engine equals PEFT's `forward` and `generate` on NF4."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapters.adapter_files import BASE, lora_config, write_adapter
from adapters.kind_files import SAMPLES
from adapters.peft_files import Case, base_info, write
from adapters.peft_kinds import Gallery, one_thread
from loraplex_adapters.convert.export.exporter import ExportRequest, run
from loraplex_adapters.format.examine import examine, inspect
from loraplex_adapters.format.kinds.activation import MAX_INVOCATION_TOKENS
from loraplex_adapters.store import Store
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.base.refusal import Refusal
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_server.engine.adapters.loader import LoaderResult, LoaderTask, execute
from loraplex_server.engine.batching.scheduler import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    Logprobs,
    Merge,
    Output,
    SamplingParams,
    StepReport,
    Submit,
)
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, build

from model import peft_oracle, tiny

VARIANT = "qwen2"
NEW = 5
ALORAS: dict[str, dict[str, Any]] = {
    "alora": {"target_modules": "all-linear", "alora_invocation_tokens": [7, 3]},
    "alora with a head": {
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "alora_invocation_tokens": [9],
        "use_rslora": True,
    },
    "alora with biases of B": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "alora_invocation_tokens": [5, 5],
        "lora_bias": True,
        "rank_pattern": {"k_proj": 2},
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}
PROMPTS: dict[str, list[int]] = {
    "once": [1, 40, 41, 42, 7, 3, 43, 44],
    "several": [7, 3, 50, 51, 7, 3, 52, 9, 53, 9, 54, 5, 5, 55],
    "overlapping": [60, 5, 5, 5, 61, 9, 9, 62, 7, 7, 3, 3, 63],
    "at the start": [7, 3, 70, 71, 72],
    "at the end": [80, 81, 9, 82, 5, 5, 7, 3],
    "none": [90, 3, 7, 91, 92, 5],
    "one token": [9],
}


class World:
    """A base, adapters that PEFT has written for it, and what PEFT answers with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gallery = Gallery(root)
        self.quantised = cache(self._quantised)
        self.model = cache(self._model)
        self.directory = cache(self._directory)
        self.expected = cache(self._expected)

    def _quantised(self) -> Any:
        return peft_oracle.quantised(self.gallery.checkpoint(VARIANT), torch.float32)

    def _directory(self, name: str) -> Path:
        options = {"r": 4, "lora_alpha": 8, **{**ALORAS, **OTHERS}[name]}
        return write(Case(VARIANT, "LoraConfig", options, {}), self.root / name)

    def _model(self, name: str) -> Any:
        if not name:
            return self._quantised()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(self._quantised(), self.directory(name)).eval()

    def _expected(self, name: str, prompt: str) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and log-probabilities [prompt and new tokens - 1, vocab]."""
        model, ids = self.model(name), torch.tensor([PROMPTS[prompt]])
        model.generation_config.eos_token_id = None
        with torch.no_grad(), one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scored = model(input_ids=ids).logits[0]
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        torch.testing.assert_close(made.logits[0][0], scored[-1])
        logits = torch.cat([scored[:-1], *made.logits])
        return made.sequences[0, ids.shape[1] :].tolist(), logits.log_softmax(-1)


class AtOnce:
    """A loader without a thread."""

    lanes = 2

    def __init__(self, runner: LocalRunner) -> None:
        self._runner = runner
        self._results: list[LoaderResult] = []

    def start(self, task: LoaderTask) -> None:
        self._results.append(execute(self._runner, task, lambda: 0.0))

    def poll(self) -> LoaderResult | None:
        return self._results.pop(0) if self._results else None


class Served:
    """An engine over the real model, and the outputs of its requests."""

    def __init__(self, world: World, decoder: str, kv_tokens: int = 4096, **limits: int) -> None:
        runner = build(
            RunnerConfig(
                model=str(world.gallery.checkpoint(VARIANT)),
                dtype="float32",
                device="cpu",
                threads=1,
                cache="var/cache",
                max_context=0,
                kv_tokens=kv_tokens,
                kv_memory=0,
                adapter_memory=1 << 24,
                merge_memory=1 << 24,
                merge_dtype="float32",
                max_rank=16,
            )
        )
        if decoder == "reference":
            weights = world.gallery.weights(VARIANT)
            size = runner.num_blocks, runner.block_size
            runner = replace(runner, decoder=ReferenceDecoder(weights, *size, runner.num_slots))
        self.world, self.runner = world, runner
        self.core = EngineCore(runner, EngineLimits(**limits), loader=AtOnce(runner))
        self.outputs: dict[int, list[Output]] = {}
        self.computed = self.preemptions = 0

    def ref(self, name: str) -> AdapterRef:
        directory = self.world.directory(name)
        return AdapterRef(inspect(directory, self.runner.info.base).digest, str(directory))

    def submit(self, name: str, prompt: str, id: int, scored: bool) -> None:
        vocabulary = tiny.VOCAB
        self.core.add(
            Submit(
                id,
                PROMPTS[prompt],
                NEW,
                [self.ref(name)] if name else [],
                SamplingParams(temperature=0.0),
                logprobs=vocabulary,
                prompt_logprobs=vocabulary if scored else None,
            )
        )

    def run(
        self, *asked: tuple[str, str], scored: bool = True
    ) -> list[tuple[list[int], np.ndarray]]:
        """Tokens, and log-probabilities as of `World.expected`, of each adapter and prompt.

        Without `scored`, log-probabilities of the new tokens only.
        """
        for id, (name, prompt) in enumerate(asked):
            self.submit(name, prompt, id, scored)
        for _ in range(500):
            for message in self.core.step():
                if isinstance(message, StepReport):
                    self.computed += message.stats.prefill_tokens + message.stats.decode_rows
                    self.preemptions = message.stats.preemptions
                    for output in message.outputs:
                        assert output.error is None, output.error
                        self.outputs.setdefault(output.id, []).append(output)
            if self.core.idle:
                break
        self.core.check()
        return [self._answer(self.outputs.pop(id)) for id in range(len(asked))]

    def _answer(self, outputs: list[Output]) -> tuple[list[int], np.ndarray]:
        assert outputs[-1].finish == "length"
        entries = [*outputs[0].prompt_logprobs, *(e for o in outputs for e in o.logprobs)]
        return [t for o in outputs for t in o.token_ids], np.stack([_line(e) for e in entries])


def _line(entry: Logprobs) -> np.ndarray:
    line = np.full(tiny.VOCAB, np.nan)
    for token, logprob in entry.top:
        line[token] = logprob
    return line


def assert_equals_peft(
    found: tuple[list[int], np.ndarray], world: World, name: str, prompt: str
) -> None:
    tokens, logprobs = world.expected(name, prompt)
    assert found[0] == tokens, (name, prompt)
    torch.testing.assert_close(
        torch.from_numpy(found[1]).float(),
        logprobs,
        atol=3e-5,
        rtol=1e-5,
        msg=lambda text: f"{name}, {prompt}: {text}",
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("alora"))


EVERYTHING = [(name, prompt) for prompt in PROMPTS for name in (*ALORAS, *OTHERS, "")]


@pytest.mark.parametrize("prompt", [prompt for prompt in PROMPTS if prompt != "none"])
def test_an_invocation_changes_the_answer(world: World, prompt: str) -> None:
    """Otherwise parity would prove nothing: neither base nor LoRA on all tokens is right."""
    name = "alora with a head" if prompt == "one token" else "alora"
    base, found = world.expected("", prompt)[1], world.expected(name, prompt)[1]
    assert (found[-1] - base[-1]).abs().max() > 3e-2


@pytest.mark.parametrize("decoder", ["native", "reference"])
def test_a_batch_of_all_kinds_and_prompts_equals_peft(world: World, decoder: str) -> None:
    served = Served(world, decoder)
    for (name, prompt), found in zip(EVERYTHING, served.run(*EVERYTHING), strict=True):
        assert_equals_peft(found, world, name, prompt)


@pytest.mark.parametrize("decoder", ["native", "reference"])
def test_without_an_invocation_it_is_the_base(world: World, decoder: str) -> None:
    served = Served(world, decoder)
    (base, *others) = served.run(("", "none"), *((name, "none") for name in ALORAS))
    for other in others:
        assert other[0] == base[0]
        assert np.array_equal(other[1], base[1])


def test_cut_anywhere_it_has_the_same_bits(world: World) -> None:
    asked = [(name, prompt) for prompt in PROMPTS for name in ALORAS]
    together = Served(world, "native").run(*asked)
    for budget in (1, 2, 3, 5, 6, 7):
        served = Served(world, "native", token_budget=budget, max_running=1)
        for one, other in zip(together, served.run(*asked), strict=True):
            assert one[0] == other[0]
            assert np.array_equal(one[1], other[1])


def test_preempted_it_has_the_same_bits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests whose answers do not fit the cache together."""
    monkeypatch.setitem(PROMPTS, "long", [11] * 29 + [7, 3])
    asked = [("alora", "long"), ("alora", "long")]
    alone = Served(world, "native").run(asked[0])[0]
    served = Served(world, "native", kv_tokens=80, prefix_cache=False)
    for found in served.run(*asked):
        assert found[0] == alone[0]
        assert np.array_equal(found[1], alone[1])
    assert served.preemptions
    assert_equals_peft(alone, world, "alora", "long")


@pytest.mark.parametrize("decoder", ["native", "reference"])
def test_keys_and_values_of_the_base_are_shared_and_change_no_bit(
    world: World, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Served(world, decoder).runner.block_size
    before = [11 + at % 60 for at in range(2 * size + 3)]
    monkeypatch.setitem(PROMPTS, "shared", [*before, 7, 3, 8])
    whole = len(PROMPTS["shared"]) + NEW - 1
    alone = {
        name: Served(world, decoder).run((name, "shared"), scored=False)[0]
        for name in ("", "alora", "lora")
    }
    for first, second in (("", "alora"), ("alora", ""), ("alora", "alora"), ("lora", "alora")):
        served = Served(world, decoder, prefix_cache=True)
        rest = whole if first == "lora" else whole - 2 * size
        for name, computed in ((first, whole), (second, rest)):
            served.computed = 0
            (found,) = served.run((name, "shared"), scored=False)
            assert served.computed == computed
            assert found[0] == alone[name][0]
            assert np.array_equal(found[1], alone[name][1])
            tokens, logprobs = world.expected(name, "shared")
            assert found[0] == tokens
            close = torch.from_numpy(found[1]).float()
            torch.testing.assert_close(close, logprobs[-NEW:], atol=3e-5, rtol=1e-5)


def test_merged_on_demand_only_the_rows_after_the_invocation_use_the_copies(world: World) -> None:
    served = Served(world, "native")
    served.core.control(Merge(1, served.ref("alora")))
    for (name, prompt), found in zip(EVERYTHING, served.run(*EVERYTHING), strict=True):
        assert_equals_peft(found, world, name, prompt)
    assert any(r.merged_bytes for r in served.core.adapters.slots.residents.values())


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"alora_invocation_tokens": []}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": 7}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": "7"}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [[7]]}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [7.0]}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [True]}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [-1]}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": False}, "ADAPTER_INVALID", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [40]}, "BASE_MODEL_MISMATCH", "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [1 << 40]}, "BASE_MODEL_MISMATCH", "alora_invocation_tokens"),
    (
        {"alora_invocation_tokens": [1] * (MAX_INVOCATION_TOKENS + 1)},
        "ADAPTER_UNSUPPORTED",
        "alora_invocation_tokens",
    ),
    ({"use_dora": True}, "ADAPTER_UNSUPPORTED", "use_dora"),
    ({"use_bdlora": {"nblocks": 2}}, "ADAPTER_UNSUPPORTED", "use_bdlora"),
    ({"use_qalora": True}, "ADAPTER_UNSUPPORTED", "use_qalora"),
    ({"kasa_config": {"beta": 1e-4}}, "ADAPTER_UNSUPPORTED", "kasa_config"),
    ({"velora_config": {"num_groups": 2}}, "ADAPTER_UNSUPPORTED", "velora_config"),
    ({"monteclora_config": {"num_samples": 2}}, "ADAPTER_UNSUPPORTED", "monteclora_config"),
    ({"target_parameters": ["mlp.w"]}, "ADAPTER_UNSUPPORTED", "target_parameters"),
    ({"init_lora_weights": "mica"}, "ADAPTER_UNSUPPORTED", "init_lora_weights"),
    ({"bias": "all"}, "ADAPTER_UNSUPPORTED", "bias"),
    ({"bias": "lora_only"}, "ADAPTER_UNSUPPORTED", "bias"),
    ({"modules_to_save": ["norm"]}, "ADAPTER_UNSUPPORTED", "modules_to_save"),
    ({"trainable_token_indices": [1]}, "ADAPTER_UNSUPPORTED", "trainable_token_indices"),
    ({"peft_type": "ADALORA", "init_r": 4}, "ADAPTER_UNSUPPORTED", "alora_invocation_tokens"),
]


@pytest.mark.parametrize(("options", "reason", "field"), WRONG, ids=str)
def test_what_cannot_be_right_is_refused_by_name(
    options: dict[str, Any], reason: str, field: str, tmp_path: Path
) -> None:
    config = lora_config(**{"alora_invocation_tokens": [7, 3], **options})
    report = examine(write_adapter(tmp_path, config), BASE)
    assert report.spec is None
    assert (reason, field) in {(f.reason, f.field) for f in report.findings}


def test_an_option_that_is_null_changes_nothing(tmp_path: Path) -> None:
    without = inspect(write_adapter(tmp_path / "without", lora_config()), BASE)
    config = lora_config(alora_invocation_tokens=None, use_dora=False)
    null = inspect(write_adapter(tmp_path / "null", config), BASE)
    assert replace(null, digest="") == replace(without, digest="")
    assert null.invocation_tokens == null.notes == ()


def test_lora_on_the_embeddings_beside_it_is_refused_as_by_peft(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "alora_invocation_tokens": [7]}
    with pytest.raises(ValueError, match="variant combination"):
        peft.get_peft_model(tiny.build(VARIANT), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    config, tensors = SAMPLES["lora-embeddings"]
    sound = write_adapter(tmp_path / "sound", config, tensors)
    assert examine(sound, BASE).spec is not None
    report = examine(
        write_adapter(tmp_path / "x", {**config, "alora_invocation_tokens": [7]}, tensors), BASE
    )
    found = {(f.reason, f.field) for f in report.findings}
    assert ("ADAPTER_UNSUPPORTED", "model.embed_tokens") in found


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.norm", "lm_head"])
def test_a_copy_of_the_bases_weights_beside_it_must_equal_them(
    world: World, module: str, tmp_path: Path
) -> None:
    """PEFT would load a changed one, and compute the tokens before the invocation with it."""
    name = f"base_model.model.{module}.weight"
    weight = tiny.build(VARIANT).get_submodule(module).weight.detach().clone()
    base = base_info(VARIANT)
    for folder, change in (("equal", 0.0), ("changed", 0.5)):
        case = Case(
            VARIANT,
            "LoraConfig",
            {"r": 4, **ALORAS["alora"]},
            {},
            edit=lambda tensors, change=change: tensors.update({name: weight + change}),
        )
        report = examine(write(case, tmp_path / folder), base)
        if change:
            assert [(f.reason, f.field) for f in report.findings] == [("ADAPTER_UNSUPPORTED", name)]
            assert "before the invocation" in report.findings[0].message
        else:
            assert report.spec is not None, report.findings
            assert report.spec.target_modules == tuple(PROJECTIONS)
            assert report.spec.invocation_tokens == (7, 3)


def test_the_owner_learns_from_where_it_acts_and_the_store_keeps_it(
    world: World, tmp_path: Path
) -> None:
    base = base_info(VARIANT)
    store = Store(tmp_path / "store")
    record, _ = store.register("one", world.directory("alora"), base)
    assert record.invocation_tokens == (7, 3)
    assert any("last occurrence of its invocation tokens" in note for note in record.notes)
    plain, _ = store.register("two", world.directory("lora"), base)
    assert plain.invocation_tokens == ()
    store.close()
    again = Store(tmp_path / "store")
    assert again.resolve("one").invocation_tokens == (7, 3)


@pytest.mark.parametrize(
    ("format", "blend"), [("hf", ""), ("nf4", ""), ("gguf", ""), ("peft", "cat")]
)
def test_it_is_neither_merged_nor_blended_nor_converted(
    world: World, format: str, blend: str, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match="does not support"):
        world.model("alora").merge_and_unload()
    request = ExportRequest(
        ("alora",), format, str(world.gallery.checkpoint(VARIANT)), Path("var/cache"), blend=blend
    )
    with pytest.raises(Refusal, match="alora_invocation_tokens") as refused:
        run(request, tmp_path / "out", world.directory)
    assert refused.value.reason == "EXPORT_UNSUPPORTED"
    assert not (tmp_path / "out").exists()
