"""GGUF files give the tensors and the configuration that transformers gives."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
import torch
from loraplex_model.base import families
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.gguf_file import ROPE_FACTORS, GgufSource
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops import nf4
from model.conftest import Load

from model import tiny

_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(variant: str, path: Path, **metadata: str | int) -> Path:
    """The variant as llama.cpp would have converted it, without quantisation."""
    model = tiny.build(variant)
    config = model.config
    kind = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(tiny.VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        name = key.replace("_dot_", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if kind == "llama" and parts[-2] in heads:
            rows = tensor.reshape(heads[parts[-2]], 2, -1, *tensor.shape[1:])
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        if parts[1] == "layers":
            name = f"blk.{parts[2]}.{_NAMES[parts[-2]]}.{parts[-1]}"
        elif name == families.LM_HEAD and config.tie_word_embeddings:
            continue
        else:
            heads_or_norm = {"embed_tokens": "token_embd", "norm": "output_norm"}
            name = f"{heads_or_norm.get(parts[-2], 'output')}.weight"
        writer.add_tensor(name, tensor.contiguous().numpy())
    if variant == "llama-rope-llama3":
        plain = tiny.VARIANTS["llama"][0]
        assert plain is type(config)
        default = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)
        scaled = decoder_config(config.to_dict()).rope_inv_freq
        writer.add_tensor(ROPE_FACTORS, (default / torch.tensor(scaled)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied-bias", "llama-rope-llama3", "mistral", "qwen2", "qwen3"]
)
def test_a_gguf_file_loads_like_its_safetensors(
    variant: str, tmp_path: Path, load_tiny: Load
) -> None:
    base = load_base(str(write(variant, tmp_path / "m.gguf")), torch.float32, tmp_path / "cache")
    ours, expected = base.weights, load_tiny(variant).weights
    assert torch.equal(ours.embed, expected.embed)
    assert torch.equal(ours.lm_head, expected.lm_head)
    for layer, other in zip(ours.layers, expected.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            one, two = getattr(layer, name), getattr(other, name)
            assert torch.equal(nf4.dequantize(one), nf4.dequantize(two)), name
        for name in ("qkv_bias", "o_bias", "q_norm", "k_norm", "input_norm", "post_norm"):
            one, two = getattr(layer, name), getattr(other, name)
            assert (one is None and two is None) or torch.equal(one, two), name
    torch.testing.assert_close(
        torch.tensor(ours.config.rope_inv_freq), torch.tensor(expected.config.rope_inv_freq)
    )
    assert ours.eos_token_ids == (2,)


def test_other_architectures_and_scaled_positions_are_refused(tmp_path: Path) -> None:
    scaled = write("qwen2", tmp_path / "scaled.gguf", qwen2_dot_rope_dot_scaling_dot_type="yarn")
    with pytest.raises(Refusal, match="safetensors") as caught:
        GgufSource(scaled)
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Refusal, match="gpt2") as caught:
        GgufSource(tmp_path / "other.gguf")
    assert caught.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGML" + bytes(40),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 40),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<II", 99, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 1 << 30),
    ],
    ids=["empty", "magic", "short", "string", "array", "type", "dimensions"],
)
def test_a_malformed_header_is_a_typed_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(Refusal) as caught:
        GgufSource(path)
    assert caught.value.reason == "MODEL_INVALID"


def test_a_file_cut_anywhere_is_a_typed_error(tmp_path: Path) -> None:
    whole = write("qwen3", tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for end in (*range(1, 400, 13), *range(400, len(whole), len(whole) // 20)):
        path.write_bytes(whole[:end])
        with pytest.raises(Refusal) as caught:
            GgufSource(path)
        assert caught.value.reason == "MODEL_INVALID"
