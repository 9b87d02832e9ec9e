"""A checkpoint becomes the model that it is, or is refused with the tensor or field at fault."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import variants
from families.variants import rounded
from loraplex_model.base.fields import MAX_TABLE_BYTES
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.checkpoint import SafetensorsSource
from loraplex_model.checkpoints.convert import convert
from loraplex_model.checkpoints.load import load_base
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.decoder.reference import ReferenceDecoder
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import gguf_files, tiny

Tensors = dict[str, torch.Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.1."


def edited(directory: Path, change: Callable[[Tensors], object], **fields: Any) -> Path:
    """The checkpoint with other tensors and other entries of its configuration."""
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return directory


def loaded(directory: Path) -> BaseWeights:
    return load_base(str(directory), torch.float32, directory.parent / "cache").weights


def refused(directory: Path) -> Refusal:
    with pytest.raises(Refusal) as caught:
        loaded(directory)
    assert "\n" not in caught.value.message
    assert not list((directory.parent / "cache").glob("entries/*/*"))
    return caught.value


def logits(weights: BaseWeights) -> torch.Tensor:
    sequence = Sequence(token_ids(0, 20, tiny.VOCAB))
    driver = Driver(ReferenceDecoder(weights, NUM_BLOCKS, BLOCK_SIZE, 1))
    driver.step((sequence, len(sequence.ids)))
    return torch.cat(sequence.logits)


def theirs(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return rounded(model)(torch.tensor([token_ids(0, 20, tiny.VOCAB)])).logits[0]


# The output head.


def test_a_head_that_differs_is_used_although_the_configuration_ties_it(tmp_path: Path) -> None:
    own = torch.randn(tiny.VOCAB, 128, generator=torch.Generator().manual_seed(5))
    directory = edited(
        tiny.write("llama-tied-bias", tmp_path / "model"), lambda t: t.update({HEAD: own})
    )
    weights = loaded(directory)
    assert not weights.config.tie_embeddings
    torch.testing.assert_close(logits(weights), theirs(directory), atol=1e-4, rtol=1e-5)
    assert (weights.lm_head - weights.embed).abs().max() > 1


@pytest.mark.parametrize("case", ["beside", "alone", "in another type"])
def test_a_head_that_is_the_embeddings_stays_tied(case: str, tmp_path: Path) -> None:
    plain = tiny.write("llama-tied-bias", tmp_path / "plain")

    def change(tensors: Tensors) -> None:
        same = tensors.pop(EMBED) if case == "alone" else tensors[EMBED].clone()
        tensors[HEAD] = same.bfloat16() if case == "in another type" else same

    directory = edited(tiny.write("llama-tied-bias", tmp_path / "model"), change)
    assert HEAD in load_file(directory / "model.safetensors")
    assert HEAD not in load_file(plain / "model.safetensors")
    weights = loaded(directory)
    assert weights.lm_head is weights.embed
    assert weights.fingerprint == loaded(plain).fingerprint
    torch.testing.assert_close(logits(weights), theirs(directory), atol=1e-4, rtol=1e-5)


def test_a_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    directory = edited(tiny.write("llama", tmp_path / "model"), lambda t: t.pop(HEAD))
    refusal = refused(directory)
    assert refusal.reason == "MODEL_INVALID"
    assert "no lm_head.weight" in refusal.message
    assert "tie_word_embeddings false" in refusal.message


# Values.

VALUES = {
    EMBED: "llama",
    HEAD: "llama",
    "model.norm.weight": "llama",
    LAYER + "input_layernorm.weight": "qwen3-window-bias",
    LAYER + "self_attn.q_norm.weight": "qwen3-window-bias",
    LAYER + "self_attn.k_proj.bias": "qwen3-window-bias",
    LAYER + "self_attn.v_proj.weight": "llama",
    LAYER + "mlp.down_proj.weight": "llama-odd-sizes",
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("wrong", [float("nan"), -float("inf")])
def test_values_that_are_not_finite_are_refused(name: str, wrong: float, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = wrong

    refusal = refused(edited(tiny.write(VALUES[name], tmp_path / "model"), change))
    assert refusal.reason == "MODEL_INVALID"
    assert refusal.message.startswith(f"{name} has values that are NaN, infinite or too large")


def test_a_value_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double() * 1e39

    refusal = refused(edited(tiny.write("llama", tmp_path / "model"), change))
    assert refusal.message.startswith("model.norm.weight has values")


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [("blk.1.ffn_up.weight", LAYER + "mlp.up_proj.weight"), ("output_norm.weight", "model.norm")],
)
def test_values_of_a_gguf_file_are_finite_too(gguf_name: str, name: str, tmp_path: Path) -> None:
    shape = tuple(reversed((64,) if "norm" in gguf_name else (64, 128)))
    wrong = {gguf_name: np.full(shape, np.nan, np.float32)}
    refusal = refused(gguf_files.write("llama", tmp_path / "m.gguf", tensors=wrong))
    assert refusal.reason == "MODEL_INVALID"
    assert refusal.message.startswith(name)
    assert "values that are NaN" in refusal.message


def quantised(directory: Path, double: bool) -> Path:
    """The checkpoint with one matrix as bitsandbytes stores it."""
    import bitsandbytes.functional as bnb

    name = LAYER + "mlp.up_proj.weight"

    def change(tensors: Tensors) -> None:
        packed, state = bnb.quantize_4bit(
            tensors[name], blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    return edited(directory, change)


def as_json(change: Callable[[dict[str, Any]], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    def of(tensor: torch.Tensor) -> torch.Tensor:
        state = json.loads(bytes(tensor.tolist()))
        change(state)
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return of


STATE = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("double", "part", "change"),
    [
        (False, "absmax", lambda t: t.fill_(float("nan"))),
        (True, "nested_absmax", lambda t: t.fill_(float("inf"))),
        (True, STATE, as_json(lambda s: s.update(nested_offset=float("nan")))),
        (True, STATE, as_json(lambda s: s.update(nested_offset="0.1"))),
        (True, STATE, as_json(lambda s: s.pop("nested_offset"))),
        (True, STATE, as_json(lambda s: s.update(shape=5))),
        (True, STATE, as_json(lambda s: s.update(blocksize="64"))),
        (True, STATE, lambda t: t[:-3].clone()),
        (True, STATE, lambda t: t.float()),
        (True, STATE, lambda t: torch.zeros(1 << 17, dtype=torch.uint8)),
        (True, STATE, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        (True, "absmax", lambda t: t[:-1].clone()),
        (True, "absmax", lambda t: t.float()),
    ],
)
def test_damaged_nf4_is_refused_by_the_module(
    double: bool,
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    tmp_path: Path,
) -> None:
    directory = quantised(tiny.write("llama", tmp_path / "model"), double)
    name = f"{LAYER}mlp.up_proj.weight"

    def damage(tensors: Tensors) -> None:
        tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"])

    sound = shutil.copytree(directory, tmp_path / "sound" / "model")
    loaded(sound)
    refusal = refused(edited(directory, damage))
    assert refusal.reason in ("MODEL_INVALID", "MODEL_UNSUPPORTED")
    assert name in refusal.message


def test_a_file_that_does_not_fit_the_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch maps a file only if the machine has memory for all of it."""

    def no_memory(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("unable to mmap 141107505384 bytes: Cannot allocate memory (12)")

    directory = tiny.write("llama", tmp_path / "model")
    monkeypatch.setattr("loraplex_model.checkpoints.checkpoint.safe_open", no_memory)
    refusal = refused(directory)
    assert refusal.reason == "MODEL_UNSUPPORTED"
    assert refusal.message.startswith(f"{directory / 'model.safetensors'} cannot be mapped")


# Tensors that the decoder does not have.

BIAS = torch.zeros(64)


@pytest.mark.parametrize(
    ("names", "reason", "says"),
    [
        ([LAYER + "self_attn.q_proj.bias"], "MODEL_INVALID", "does not have"),
        ([LAYER + "self_attn.q_norm.weight"], "MODEL_INVALID", "does not have"),
        ([LAYER + "post_feedforward_layernorm.weight"], "MODEL_INVALID", "does not have"),
        (["model.norm.bias"], "MODEL_INVALID", "does not have"),
        (["lm_head.bias"], "MODEL_INVALID", "does not have"),
        (["model.embed_positions.weight"], "MODEL_INVALID", "does not have"),
        (["transformer.h.0.attn.c_attn.weight"], "MODEL_INVALID", "does not have"),
        (["visual.patch_embed.proj.weight"], "MODEL_INVALID", "does not have"),
        (["model.layers.3.input_layernorm.weight"], "MODEL_INVALID", "num_hidden_layers 3"),
        (["model.layers.07.input_layernorm.weight"], "MODEL_INVALID", "num_hidden_layers 3"),
        ([LAYER + "mlp.experts.0.up_proj.weight"], "MODEL_UNSUPPORTED", "experts"),
        ([LAYER + "block_sparse_moe.gate.weight"], "MODEL_UNSUPPORTED", "experts"),
        ([LAYER + "self_attn.q_proj.lora_A.default.weight"], "MODEL_UNSUPPORTED", "an adapter"),
        ([LAYER + "self_attn.q_proj.base_layer.weight"], "MODEL_UNSUPPORTED", "an adapter"),
        ([LAYER + "mlp.up_proj.weight_scale_inv"], "MODEL_UNSUPPORTED", "quantised in a way"),
        ([LAYER + "mlp.up_proj.SCB"], "MODEL_UNSUPPORTED", "quantised in a way"),
        ([LAYER + "mlp.up_proj.qweight"], "MODEL_UNSUPPORTED", "quantised in a way"),
        ([LAYER + "mlp.up_proj.weight.absmax"], "MODEL_UNSUPPORTED", "quantised in a way"),
    ],
)
def test_a_tensor_that_is_not_read_is_refused_by_its_name(
    names: list[str], reason: str, says: str, tmp_path: Path
) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    refusal = refused(edited(directory, lambda t: t.update({name: BIAS.clone() for name in names})))
    assert refusal.reason == reason
    assert names[0] in refusal.message
    assert says in refusal.message


def test_only_the_first_of_many_are_shown(tmp_path: Path) -> None:
    more = {f"{LAYER}self_attn.{part}_proj.bias": BIAS.clone() for part in "qkvoxyz"}
    refusal = refused(edited(tiny.write("llama", tmp_path / "model"), lambda t: t.update(more)))
    assert "and 4 more" in refusal.message


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ([LAYER + "self_attn.rotary_emb.inv_freq"], {}),
        ([LAYER + "self_attn.masked_bias", "v_head.summary.weight"], {}),
        (["mtp.layers.0.mlp.up_proj.weight"], {}),
        (["model.layers.3.eh_proj.weight"], {"num_nextn_predict_layers": 1}),
        (["vision_tower.layers.0.weight"], {"vision_config": {}}),
    ],
)
def test_tensors_without_an_effect_are_ignored(
    names: list[str], fields: dict[str, Any], tmp_path: Path
) -> None:
    plain = loaded(tiny.write("llama", tmp_path / "plain")).fingerprint
    directory = tiny.write("llama", tmp_path / "model")
    edited(directory, lambda t: t.update({name: BIAS.clone() for name in names}), **fields)
    assert loaded(directory).fingerprint == plain


def test_a_type_of_another_quantisation_is_refused(tmp_path: Path) -> None:
    name = LAYER + "mlp.up_proj.weight"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    refusal = refused(edited(tiny.write("llama", tmp_path / "model"), change))
    assert refusal.reason == "MODEL_UNSUPPORTED"
    assert refusal.message.startswith(f"{name} is of type F8_E4M3")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model", max_shard_size="100KB")
    first, second, *_ = sorted(directory.glob("model-*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    refusal = refused(directory)
    assert refusal.reason == "MODEL_INVALID"
    assert f"holds {name} twice" in refusal.message


# Configurations.


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("hidden_size", (0, -64, "64", 64.0, True, None, [64], 1 << 40)),
        ("num_hidden_layers", (0, -1, "2", 2.5, 10**9)),
        ("num_attention_heads", (0, -4, None, 10**9)),
        ("num_key_value_heads", (0, -2, "2", True, 10**9)),
        ("head_dim", (0, -2, "2", 10**9)),
        ("vocab_size", (0, -1, None, 10**12)),
        ("intermediate_size", (0, -1, 10**12)),
        ("max_position_embeddings", (0, -1, "256", 10**9, 10**30)),
        ("rms_norm_eps", (0, -1e-6, float("nan"), float("inf"), "1e-6", None, 1e-300)),
        ("rope_theta", (0, -1.0, float("nan"), float("inf"), "1e4", None, 1e300)),
        ("sliding_window", (0, -1, "7")),
    ],
)
def test_impossible_numbers_are_refused_by_their_field(
    field: str, values: tuple[Any, ...], tmp_path: Path
) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    plain = json.loads((directory / "config.json").read_text())
    plain.pop("rope_parameters")
    for value in values:
        (directory / "config.json").write_text(json.dumps(plain | {field: value}))
        refusal = refused(directory)
        assert refusal.reason in ("MODEL_INVALID", "MODEL_UNSUPPORTED")
        assert f"has {field} " in refusal.message, value


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "linear"},
        {"rope_type": ["linear"], "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1.0},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": "1"},
        {"rope_type": "default", "partial_rotary_factor": 3.0},
        "default",
    ],
    ids=str,
)
def test_impossible_rotations_are_refused(parameters: Any, tmp_path: Path) -> None:
    directory = edited(tiny.write("llama", tmp_path / "model"), lambda _: None)
    if isinstance(parameters, dict):
        parameters = {"rope_theta": 1e4} | parameters
    refusal = refused(edited(directory, lambda _: None, rope_parameters=parameters))
    assert refusal.reason in ("MODEL_INVALID", "MODEL_UNSUPPORTED")


@pytest.mark.parametrize("count", [0, 5, 9])
def test_more_experts_for_a_token_than_there_are_are_refused(count: int, tmp_path: Path) -> None:
    directory = variants.write("mixtral", tmp_path / "model")
    refusal = refused(edited(directory, lambda _: None, num_experts_per_tok=count))
    assert refusal.reason == "MODEL_INVALID"
    assert f"num_experts_per_tok {count}" in refusal.message


@pytest.mark.parametrize("part", [3.0, 0.01, 0.0, -0.5, "0.5"])
def test_an_impossible_part_of_a_head_is_refused(part: Any, tmp_path: Path) -> None:
    directory = variants.write("stablelm", tmp_path / "model")
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}
    refusal = refused(edited(directory, lambda _: None, rope_parameters=parameters))
    assert refusal.reason in ("MODEL_INVALID", "MODEL_UNSUPPORTED")


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": "true"},
        {"attention_bias": 1},
        {"hidden_act": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": None, "model_type": {}},
        {"quantization_config": "nf4"},
        {"text_config": []},
    ],
    ids=str,
)
def test_wrong_types_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    if "text_config" in fields:
        fields["architectures"] = ["Gemma3ForConditionalGeneration"]
    refusal = refused(edited(directory, lambda _: None, **fields))
    assert refusal.reason in ("MODEL_INVALID", "MODEL_UNSUPPORTED")


def test_the_tables_of_rotations_bound_the_positions(tmp_path: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    most = MAX_TABLE_BYTES // (4 * 16)
    edited(directory, lambda _: None, max_position_embeddings=most + 1)
    refusal = refused(directory)
    assert refusal.reason == "MODEL_UNSUPPORTED"
    assert f"at most {most} positions" in refusal.message
    edited(directory, lambda _: None, max_position_embeddings=most)
    assert loaded(directory).config.max_positions == most


def test_a_shape_is_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    refusal = refused(edited(directory, lambda _: None, vocab_size=1 << 24, hidden_size=1 << 18))
    assert refusal.reason == "MODEL_INVALID"
    assert "model.embed_tokens.weight is F32 [128, 64]" in refusal.message


# The disk.


def test_a_disk_without_room_is_a_refusal_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SafetensorsSource(tiny.write("llama", tmp_path / "model"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(Refusal, match="free some space") as caught:
        convert(source, tmp_path / "out.safetensors")
    assert caught.value.reason is Reason.CACHE_FAILED
    assert not (tmp_path / "out.safetensors").exists()


def test_the_room_that_is_asked_for_is_the_size_of_the_file(tmp_path: Path) -> None:
    from loraplex_model.checkpoints.conversion.survey import survey

    for variant in ("llama", "qwen3-window-bias", "llama-odd-sizes"):
        source = SafetensorsSource(tiny.write(variant, tmp_path / variant))
        out = tmp_path / f"{variant}.safetensors"
        convert(source, out)
        header = int.from_bytes(out.read_bytes()[:8], "little") + 8
        assert 0 <= out.stat().st_size - header - survey(source).stored_bytes < 300


def test_a_disk_that_fills_meanwhile_is_a_refusal_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    written = 0

    def write(self: SafetensorsFile, name: str, tensor: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, name, tensor)

    original = SafetensorsFile._write
    monkeypatch.setattr(SafetensorsFile, "_write", write)
    with pytest.raises(Refusal, match=r"No space left on device.*free some space") as caught:
        loaded(directory)
    assert caught.value.reason is Reason.CACHE_FAILED
    left = [path for path in (tmp_path / "cache" / "entries").iterdir() if path.is_dir()]
    assert left == []
    monkeypatch.undo()
    assert loaded(directory).fingerprint.startswith("sha256:")
