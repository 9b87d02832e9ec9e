"""Everything in a GGUF file is used, known to be harmless, or the reason of its refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.gguf.source import GgufSource
from loraplex_model.checkpoints.load import load_base
from model.passes import packed_logits, token_ids

from model import gguf_files, tiny

_WIDTH = 16  # of a head of the tiny models
_VECTOR = np.ones(64, np.float32)


def refused(path: Path, *says: str, reason: str = "MODEL_UNSUPPORTED") -> None:
    with pytest.raises(Refusal) as caught:
        GgufSource(path)
    for part in says:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("~.rope.dimension_count", 8),
        ("~.rope.dimension_sections", [4, 2, 2, 0]),
        ("~.rope.dimension_count_swa", 8),
        ("~.rope.freq_base_swa", 1e6),
        ("~.rope.scaling.type", "longrope"),
        ("~.rope.scaling.type", "yarn"),
        ("~.rope.scaling.attn_factor", 1.2),
        ("~.rope.scaling.alpha", 50.0),
        ("~.rope.scaling.yarn_log_multiplier", 0.1),
        ("~.rope.scaling.yarn_ext_factor", 1.0),
        ("~.rope.scaling.yarn_beta_fast", 16.0),
        ("~.attention.sliding_window", 16),
        ("~.attention.sliding_window_pattern", 6),
        ("~.attention.value_length", 8),
        ("~.attention.value_length_swa", 8),
        ("~.attention.key_length_mla", 8),
        ("~.attention.layer_norm_epsilon", 1e-5),
        ("~.attention.group_norm_epsilon", 1e-5),
        ("~.attention.causal", False),
        ("~.attention.clamp_kqv", 8.0),
        ("~.attention.max_alibi_bias", 8.0),
        ("~.attention.scale", 0.5),
        ("~.attention.output_scale", 0.5),
        ("~.attention.temperature_scale", 0.1),
        ("~.attention.q_lora_rank", 32),
        ("~.attention.shared_kv_layers", 1),
        ("~.attn_logit_softcapping", 50.0),
        ("~.final_logit_softcapping", 30.0),
        ("~.logit_scale", 0.25),
        ("~.logit_scale", 0.0),
        ("~.embedding_scale", 12.0),
        ("~.residual_scale", 0.22),
        ("~.embedding_length_per_layer_input", 8),
        ("~.pooling_type", 3),
        ("~.use_parallel_residual", True),
        ("~.tensor_data_layout", "reference"),
        ("~.nextn_predict_layers", 1),
        ("~.leading_dense_block_count", 1),
        ("~.decoder_start_token_id", 0),
        ("~.classifier.output_labels", ["no", "yes"]),
        ("~.ssm.conv_kernel", 4),
        ("~.something.new", 1),
        ("~.attention.head_count", [4, 4, 2]),
        ("~.feed_forward_length", [128, 64, 128]),
        ("~.attention.head_count_kv", [2, 0, 2]),
        ("~.context_length", list(range(1, 5001))),
        ("general.quantization_version", 1),
        ("gemma2.attn_logit_softcapping", 50.0),
        ("xielu.beta", [0.5]),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_computed_is_named(key: str, value: Any, tmp_path: Path) -> None:
    for variant in ("llama", "qwen3"):
        path = gguf_files.write(variant, tmp_path / f"{variant}.gguf", {key: value})
        name = key.replace("~", variant)
        if isinstance(value, list) and len(value) > 100:
            refused(path, f"{name} = 5000 values", reason="MODEL_INVALID")
        elif isinstance(value, list):
            refused(path, f"{name} = ")
        else:
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            refused(path, f"{name} = {shown}")


@pytest.mark.parametrize(
    "keys",
    [
        {"~.rope.dimension_count": _WIDTH, "~.rope.scaling.finetuned": True},
        {"~.attention.sliding_window": 256},
        {"~.attention.sliding_window": 0, "~.attention.clamp_kqv": 0.0},
        {"~.attention.scale": _WIDTH**-0.5, "~.attention.causal": True},
        {"~.expert_count": 0, "~.expert_used_count": 0, "~.pooling_type": 0},
        {"~.attention.head_count": [4, 4, 4], "~.feed_forward_length": [128] * 3},
        {"~.tensor_data_layout": "Meta AI original pth", "~.logit_scale": 1.0},
        {"~.vocab_size": 7, "~.use_parallel_residual": False},
        {"~.rope.scaling.original_context_length": 64},
        {"general.tags": ["text"], "general.base_model.0.name": "x", "quantize.imatrix.file": "y"},
        {"mradermacher.quantized_by": "z", "general.sampling.temp": 0.5, "general.type": None},
    ],
)
def test_a_setting_that_changes_nothing_is_taken(keys: dict[str, Any], tmp_path: Path) -> None:
    plain = GgufSource(gguf_files.write("llama", tmp_path / "plain.gguf"))
    assert GgufSource(gguf_files.write("llama", tmp_path / "m.gguf", keys)).config == plain.config


@pytest.mark.parametrize(
    "key",
    [
        "block_count", "context_length", "embedding_length", "feed_forward_length",
        "attention.head_count", "attention.layer_norm_rms_epsilon",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 0, -4, float("nan"), float("inf"), "4", True, [], 1 << 31])
def test_a_missing_or_senseless_setting_is_named(key: str, value: Any, tmp_path: Path) -> None:
    if key.endswith("epsilon") and value == 1 << 31:
        return
    path = gguf_files.write("llama", tmp_path / "m.gguf", {f"~.{key}": value})
    refused(path, f"llama.{key}", reason="MODEL_INVALID")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.post_attention_norm.weight", "blk.2.post_ffw_norm.weight", "blk.1.attn_qkv.weight",
        "blk.0.attn_q_norm.bias", "blk.0.attn_sinks.weight",
        "blk.0.attn_norm.bias", "blk.0.attn_q.scale",
        "blk.0.ffn_down.input_scale", "blk.0.nextn.eh_proj.weight",
        "blk.0.layer_output_scale.weight",
        "output.bias", "output_norm.bias", "token_embd_norm.weight", "position_embd.weight",
        "token_types.weight", "cls.weight", "rope_factors_long.weight",
        "per_layer_token_embd.weight",
        "v.blk.0.attn_q.weight", "something", "blk.0.attn_q.weight.lora_a", "blk.x.attn_q.weight",
        "blk.0.attn_q", "enc.blk.0.attn_q.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_used_is_named(name: str, tmp_path: Path) -> None:
    for variant in ("llama", "qwen2"):
        tensors = {name: _VECTOR}
        refused(gguf_files.write(variant, tmp_path / f"{variant}.gguf", tensors=tensors), name)


def test_head_norms_are_used_only_where_the_family_has_them(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q_norm.weight": np.ones(_WIDTH, np.float32)}
    path = gguf_files.write("llama", tmp_path / "m.gguf", tensors=tensors)
    refused(path, "blk.0.attn_q_norm.weight")
    for name, size in (("attn_output", 192), ("ffn_up", 128), ("ffn_down", 192)):
        tensors = {f"blk.1.{name}.bias": np.ones(size, np.float32)}
        biased = gguf_files.write("qwen2", tmp_path / "q.gguf", tensors=tensors)
        refused(biased, f"blk.1.{name}.bias")
    biased = gguf_files.write(
        "qwen2", tmp_path / "q.gguf", tensors={"blk.0.attn_output.bias": _VECTOR}
    )
    refused(biased, "blk.0.attn_output.bias")


def test_rotary_frequencies_of_early_converters_are_harmless(tmp_path: Path) -> None:
    tensors = {f"blk.{i}.attn_rot_embd": np.ones(8, np.float32) for i in range(3)}
    GgufSource(gguf_files.write("llama", tmp_path / "m.gguf", tensors=tensors))


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.1.attn_k.weight", "blk.2.ffn_norm.weight"],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = gguf_files.write("llama", tmp_path / "m.gguf", without=[name])
    refused(path, f"no tensor {name}", reason="MODEL_INVALID")


def test_layers_that_are_not_stated_and_stated_ones_that_are_not_there(tmp_path: Path) -> None:
    few = gguf_files.write("llama", tmp_path / "few.gguf", {"~.block_count": 2})
    refused(few, "blk.2.", "2 layers", reason="MODEL_INVALID")
    many = gguf_files.write("llama", tmp_path / "many.gguf", {"~.block_count": 4})
    refused(many, "blk.3.", reason="MODEL_INVALID")
    most = gguf_files.write("llama", tmp_path / "most.gguf", {"~.block_count": (1 << 31) - 1})
    refused(most, "layers", reason="MODEL_INVALID")


@pytest.mark.parametrize(
    "left",
    [
        ["attn_q.bias", "attn_k.bias", "attn_v.bias"],
        ["attn_q.bias"],
        ["attn_output.bias"],
        ["attn_v.bias", "attn_output.bias"],
    ],
)
def test_the_biases_that_a_file_has_are_used(left: list[str], tmp_path: Path) -> None:
    """Each projection by itself: one without a bias has none, in each layer for itself."""
    model = tiny.oracle("llama-tied-bias")
    kept = {f"blk.{i}.{name}" for i in range(2) for name in left}
    without = [
        name for name in gguf_files.converted(model) if name.endswith(".bias") and name not in kept
    ]
    path = gguf_files.write("llama-tied-bias", tmp_path / "m.gguf", without=without)
    weights = load_base(str(path), torch.float32, tmp_path / "cache").weights
    ours = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    for i, layer in enumerate(model.model.layers):
        for module, name in ours.items():
            if f"blk.{i}.{name}.bias" not in kept:
                getattr(layer.self_attn, f"{module}_proj").bias.data.zero_()
    tokens = torch.tensor(token_ids(0, 20, tiny.VOCAB))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    found = packed_logits(weights, tokens, [0, 20], [])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_a_family_with_biases_lacks_none(tmp_path: Path) -> None:
    path = gguf_files.write("qwen2", tmp_path / "m.gguf", without=["blk.1.attn_k.bias"])
    refused(path, "no tensor blk.1.attn_k.bias", reason="MODEL_INVALID")


def test_a_head_beside_the_embeddings_is_used(tmp_path: Path) -> None:
    head = torch.randn(tiny.VOCAB, 128, generator=torch.Generator().manual_seed(3))
    path = gguf_files.write(
        "llama-tied-bias", tmp_path / "m.gguf", tensors={"output.weight": head.numpy()}
    )
    weights = load_base(str(path), torch.float32, tmp_path / "cache").weights
    assert not weights.config.tie_embeddings
    assert torch.equal(weights.lm_head, head)


@pytest.mark.parametrize("divisors", [np.ones(4), np.zeros(8), np.full(8, np.nan), -np.ones(8)])
def test_divisors_of_the_frequencies_are_checked(divisors: np.ndarray, tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": divisors.astype(np.float32)}
    path = gguf_files.write("llama", tmp_path / "m.gguf", tensors=tensors)
    refused(path, "rope_freqs.weight", reason="MODEL_INVALID")


def test_frequencies_are_not_scaled_twice(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.full(8, 2, np.float32)}
    keys = {"~.rope.scaling.type": "linear", "~.rope.scaling.factor": 2.0}
    path = gguf_files.write("llama", tmp_path / "m.gguf", keys, tensors=tensors)
    refused(path, "rope_freqs.weight")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_down_shexp.weight", "blk.0.ffn_gate.3.weight",
    ],
)  # fmt: skip
def test_experts_are_called_what_they_are(name: str, tmp_path: Path) -> None:
    path = gguf_files.write("llama", tmp_path / "m.gguf", tensors={name: _VECTOR})
    refused(path, "mixture of experts", name)


@pytest.mark.parametrize("count", [8, [8, 8, 8]])
def test_a_count_of_experts_is_called_what_it_is(count: Any, tmp_path: Path) -> None:
    path = gguf_files.write("qwen2", tmp_path / "m.gguf", {"~.expert_count": count})
    refused(path, "mixture of experts", "qwen2.expert_count")


@pytest.mark.parametrize(
    ("architecture", "keys", "says"),
    [
        ("llama", {"general.type": "adapter"}, "an adapter, not a base model"),
        ("llama", {"adapter.type": "lora"}, "an adapter, not a base model"),
        ("clip", {}, "encoder of a multimodal model"),
        ("controlvector", {"controlvector.layer_count": 3}, "a control vector"),
        ("llama", {"general.type": "mmproj"}, "encoder of a multimodal model"),
        ("llama", {"clip.has_vision_encoder": True}, "encoder of a multimodal model"),
        ("", {"general.type": "imatrix"}, "an importance matrix"),
        ("", {"imatrix.chunk_count": 3}, "an importance matrix"),
        ("llama", {"general.type": "weather"}, "'weather'"),
        ("llama", {}, "a vocabulary only"),
        ("gpt2", {}, "'gpt2'"),
        ("bert", {}, "'bert'"),
        ("made-up", {}, "'made-up'"),
        ("qwen2moe", {"qwen2moe.expert_count": 60}, "mixture of experts"),
    ],
)
def test_other_files_are_called_what_they_are(
    architecture: str, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in keys.items():
        gguf_files.add(writer, key, value)
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", says)


def test_every_token_has_an_embedding(tmp_path: Path) -> None:
    for count in (tiny.VOCAB - 3, tiny.VOCAB + 1):
        keys = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(count)]}
        path = gguf_files.write("llama", tmp_path / "m.gguf", keys)
        if count > tiny.VOCAB:
            refused(path, "tokenizer.ggml.tokens", "token_embd.weight", reason="MODEL_INVALID")
        else:
            GgufSource(path)


def test_a_file_without_an_architecture_is_invalid(tmp_path: Path) -> None:
    for value in (None, 7):
        path = gguf_files.write("llama", tmp_path / "m.gguf", {"general.architecture": value})
        if value is not None:
            refused(path, "general.architecture", reason="MODEL_INVALID")
