"""What a family's GGUF files state beyond Llama's settings is used, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import test_gguf_families as cases
from families import variants
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.gguf.architectures import ARCHITECTURES
from loraplex_model.checkpoints.gguf.keys import config_of
from loraplex_model.checkpoints.gguf.settings import GgufSettings
from loraplex_model.checkpoints.gguf.source import GgufSource
from loraplex_model.checkpoints.load import load_base

from model import gguf_files

_EIGHT = np.ones(8, np.float32)
_LONG = "rope_factors_long.weight"
_SHORT = "rope_factors_short.weight"
_WHOLE_HEADS = {**variants._DEFAULT, "partial_rotary_factor": 1.0}
_MOST = {**variants._DEFAULT, "partial_rotary_factor": 0.75}


def write(case: str, tmp_path: Path, keys: dict[str, Any] | None = None, **options: Any) -> Path:
    return gguf_files.write_model(cases.built(case), tmp_path / "m.gguf", keys, **options)


@pytest.mark.parametrize(
    ("case", "keys", "says"),
    [
        ("granite", {"~.rope.scaling.finetuned": False}, "granite.rope.scaling.finetuned = False"),
        ("granite", {"~.logit_scale": 0.0}, "granite.logit_scale = 0"),
        ("cohere", {"~.logit_scale": 0.0}, "command-r.logit_scale = 0"),
        ("cohere2", {"~.rope.dimension_count": 8}, "cohere2.rope.dimension_count = 8"),
        ("cohere2", {"~.attention.sliding_window_pattern": [True]}, "sliding_window_pattern = [T"),
        ("olmo3", {"~.attention.sliding_window_pattern": [1, 0, 1]}, "sliding_window_pattern = "),
        ("olmo2", {"~.rope.freq_base_swa": 1.0}, "olmo2.rope.freq_base_swa = 1"),
        ("olmo3", {"~.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
        ("gemma", {"~.attention.sliding_window": 7}, "gemma.attention.sliding_window = 7"),
        ("gemma", {"~.final_logit_softcapping": 30.0}, "gemma.final_logit_softcapping = 30"),
        ("gemma2", {"~.rope.freq_base_swa": 500.0}, "gemma2.rope.freq_base_swa = 500"),
        ("gemma2", {"~.attention.key_length_swa": 16}, "gemma2.attention.key_length_swa = 16"),
        ("gemma3", {"~.attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping = 50"),
        ("gemma3", {"~.rope.dimension_count_swa": 16}, "gemma3.rope.dimension_count_swa = 16"),
        ("gemma3", {"~.attention.shared_kv_layers": 2}, "gemma3.attention.shared_kv_layers = 2"),
        ("glm4", {"~.rope.dimension_sections": [8, 12, 12, 0]}, "rope.dimension_sections = [8"),
        ("glm4", {"~.rope.dimension_count": 64}, "glm4.rope.dimension_count = 64"),
        ("stablelm", {"~.rope.dimension_count": 17}, "stablelm.rope.dimension_count = 17"),
        ("starcoder2", {"~.attention.sliding_window": 9}, "attention.sliding_window = 9"),
        ("ministral3", {"~.attention.temperature_length": 8}, "temperature_length = 8"),
        ("ministral3", {"~.attention.sliding_window": 8}, "mistral3.attention.sliding_window = 8"),
        ("smollm3", {"~.attention.temperature_scale": 0.1}, "smollm3.attention.temperature_scale"),
        ("phi3", {"~.rope.scaling.attn_factor": 1.19}, "phi3.rope.scaling.attn_factor = 1.19"),
        ("phi4-mini", {"~.rope.scaling.type": "yarn"}, "phi3.rope.scaling.type = 'yarn'"),
        ("phi4-mini", {"~.rope.scaling.factor": 2.0}, "phi3.rope.scaling.factor = 2"),
        ("qwen3-moe", {"~.expert_weights_norm": False}, "qwen3moe.expert_weights_norm = False"),
        ("qwen3-moe", {"~.expert_gating_func": 2}, "qwen3moe.expert_gating_func = 2"),
        ("mixtral", {"~.expert_weights_scale": 2.5}, "llama.expert_weights_scale = 2.5"),
        ("mixtral", {"~.expert_shared_count": 1}, "llama.expert_shared_count = 1"),
        ("mixtral", {"~.leading_dense_block_count": 1}, "llama.leading_dense_block_count = 1"),
    ],
)
def test_a_setting_of_another_model_is_named(
    case: str, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as caught:
        GgufSource(write(case, tmp_path, keys))
    assert says in str(caught.value)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(
    ("case", "keys", "says"),
    [
        ("granite", {"~.logit_scale": None}, "no granite.logit_scale"),
        ("granite", {"~.residual_scale": -1.0}, "granite.residual_scale = -1"),
        ("cohere", {"~.logit_scale": None}, "no command-r.logit_scale"),
        ("cohere", {"~.attention.layer_norm_epsilon": None}, "no command-r.attention.layer_norm"),
        ("cohere2", {"~.attention.sliding_window": None}, "no cohere2.attention.sliding_window"),
        ("gemma2", {"~.attn_logit_softcapping": -50.0}, "gemma2.attn_logit_softcapping = -50"),
        ("gemma3", {"~.attention.sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("phi4-mini", {"~.rope.scaling.attn_factor": None}, "no phi3.rope.scaling.attn_factor"),
        ("phi4-mini", {"~.rope.scaling.original_context_length": None}, "original_context_length"),
        ("qwen3-moe", {"~.expert_count": None}, "no qwen3moe.expert_count"),
        ("qwen3-moe", {"~.expert_count": 7}, "blk.0.ffn_gate_exps.weight has shape [6, "),
        ("qwen3-moe", {"~.expert_used_count": 9}, "qwen3moe.expert_used_count = 9"),
        ("qwen3-moe", {"~.expert_feed_forward_length": None}, "expert_feed_forward_length"),
        ("stablelm-parallel", {"~.attention.head_count_kv": 1}, "blk.0.attn_k_norm.weight"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(
    case: str, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as caught:
        GgufSource(write(case, tmp_path, keys))
    assert says in str(caught.value)
    assert caught.value.reason == "MODEL_INVALID"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("cohere2", "blk.0.ffn_norm.weight"),
        ("cohere2", "blk.0.attn_q_norm.weight"),
        ("olmo2", "blk.0.attn_norm.weight"),
        ("olmo2", "blk.3.ffn_norm.weight"),
        ("gemma", "blk.0.post_attention_norm.weight"),
        ("phi3", "blk.1.ffn_gate.weight"),
        ("phi3", "output.bias"),
        ("phi3", "rope_freqs.weight"),
        ("glm4", "blk.0.attn_output.bias"),
        ("stablelm", "blk.0.attn_q_norm.bias"),
        ("starcoder2", "blk.0.ffn_gate.weight"),
        ("starcoder2", "rope_freqs.weight"),
        ("smollm3", _LONG),
        ("granite", _LONG),
        ("phi3", _SHORT),
        ("mixtral", "blk.0.ffn_gate_shexp.weight"),
        ("mixtral", "blk.0.ffn_gate.weight"),
        ("mixtral", "blk.0.ffn_gate.3.weight"),
        ("qwen3-moe", "blk.0.exp_probs_b.bias"),
        ("ernie4_5", "blk.0.nextn.eh_proj.weight"),
    ],
)
def test_a_tensor_of_another_family_is_named(case: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        GgufSource(write(case, tmp_path, tensors={name: _EIGHT}))
    assert name in str(caught.value)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("gemma2", "blk.3.post_ffw_norm.weight"),
        ("olmo2", "blk.0.attn_k_norm.weight"),
        ("phi3", "blk.2.attn_qkv.weight"),
        ("phi4-mini", _SHORT),
        ("glm4", "blk.0.post_attention_norm.weight"),
        ("starcoder2", "blk.1.attn_norm.bias"),
        ("starcoder2", "output_norm.bias"),
        ("stablelm", "blk.1.ffn_norm.weight"),
        ("stablelm-parallel", "blk.1.attn_k_norm.weight"),
        ("mixtral", "blk.0.ffn_gate_inp.weight"),
        ("qwen3-moe", "blk.3.ffn_down_exps.weight"),
    ],
)
def test_a_missing_tensor_of_a_family_is_named(case: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        GgufSource(write(case, tmp_path, without=[name]))
    assert f"no tensor {name}" in str(caught.value)
    assert caught.value.reason == "MODEL_INVALID"


@pytest.mark.parametrize("name", [_LONG, _SHORT])
def test_long_rope_has_a_divisor_for_each_pair(name: str, tmp_path: Path) -> None:
    for values in (_EIGHT, np.zeros(6, np.float32)):
        with pytest.raises(Refusal, match=f"{name} must hold 6 numbers above 0"):
            GgufSource(write("phi4-mini", tmp_path, tensors={name: values}))


@pytest.mark.parametrize(
    ("case", "keys", "changes"),
    [
        ("gemma2", {"~.attn_logit_softcapping": None}, {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"~.final_logit_softcapping": None}, {"final_logit_softcapping": 30.0}),
        ("gemma2", {"~.attention.sliding_window": None}, {"sliding_window": 4096}),
        ("gemma3", {"~.attention.sliding_window_pattern": 3}, {"sliding_window_pattern": 3}),
        ("gemma3", {"~.rope.freq_base_swa": None}, {}),
        (
            "gemma3",
            {"~.attention.sliding_window": None},
            {"layer_types": ["full_attention"] * 7, "sliding_window": None},
        ),
        ("granite", {"~.attention.scale": None}, {"attention_multiplier": 0.25}),
        ("granite", {"~.residual_scale": None}, {"residual_multiplier": 1.0}),
        ("granite", {"~.rope.scaling.finetuned": True}, {}),
        ("olmo3", {"~.attention.sliding_window_pattern": 2}, {}),
        ("cohere2", {"~.attention.sliding_window_pattern": [1, 1, 1, 0, 1]}, {}),
        ("glm4", {"~.rope.dimension_count": None}, {"rope_parameters": _WHOLE_HEADS}),
        ("glm", {"~.rope.dimension_count": 32}, {"rope_parameters": _WHOLE_HEADS}),
        ("stablelm", {"~.rope.dimension_count": None}, {"rope_parameters": _WHOLE_HEADS}),
        ("stablelm", {"~.rope.dimension_count": 12}, {"rope_parameters": _MOST}),
        ("stablelm", {"~.use_parallel_residual": True}, {}),
        ("stablelm-parallel", {"~.use_parallel_residual": False}, {}),
        ("ministral3", {"~.attention.temperature_length": 16}, {}),
        ("mixtral", {"~.expert_gating_func": 1, "~.expert_weights_norm": True}, {}),
    ],
)
def test_what_a_file_leaves_out_is_what_llama_cpp_computes(
    case: str, keys: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    variant, own = cases.CASES[case]
    kind, more = variants.VARIANTS[variant]
    model = cases.of(kind, {**more, **own, **changes})
    path = gguf_files.write_model(model, tmp_path / "m.gguf", keys)
    weights = load_base(str(path), torch.float32, tmp_path / "cache").weights
    ids = cases.tokens()
    with torch.no_grad():
        expected = variants.rounded(model)(ids[None]).logits[0]
    torch.testing.assert_close(cases.logits(weights, ids), expected, atol=1e-4, rtol=1e-5)


def test_queries_keys_and_values_may_be_joined_or_apart(tmp_path: Path) -> None:
    """Converters of one architecture write them either way; the model is the same."""
    for case in ("glm", "phi3"):
        model = cases.build(case)
        found = gguf_files.converted(model)
        changed, without = dict[str, np.ndarray](), []
        for layer in range(model.config.num_hidden_layers):
            at = f"blk.{layer}.attn"
            parts = [f"{at}_{part}.weight" for part in "qkv"]
            if case == "glm":
                changed[f"{at}_qkv.weight"] = np.concatenate([found[part] for part in parts])
                without += parts
            else:
                whole = found[f"{at}_qkv.weight"]
                q = model.config.num_attention_heads * gguf_files.head_dim(model.config)
                rows = np.split(whole, [q, (q + len(whole)) // 2])
                changed |= dict(zip(parts, rows, strict=True))
                without.append(f"{at}_qkv.weight")
        for name, options in (("one", {}), ("other", {"tensors": changed, "without": without})):
            gguf_files.write_model(model, tmp_path / f"{name}.gguf", **options)
        one, other = (
            load_base(str(tmp_path / f"{name}.gguf"), torch.float32, tmp_path / "cache").weights
            for name in ("one", "other")
        )
        assert one.fingerprint == other.fingerprint


def test_too_few_joined_rows_are_named(tmp_path: Path) -> None:
    model = cases.build("glm")
    found = gguf_files.converted(model)
    parts = [f"blk.0.attn_{part}.weight" for part in "qkv"]
    rows = np.concatenate([found[part] for part in parts])[:-1]
    path = gguf_files.write_model(
        model, tmp_path / "m.gguf", tensors={"blk.0.attn_qkv.weight": rows}, without=parts
    )
    with pytest.raises(Refusal, match=r"blk\.0\.attn_qkv\.weight has shape"):
        GgufSource(path)


@pytest.mark.parametrize("case", ["gemma", "cohere2"])
def test_a_head_beside_the_embeddings_is_used(case: str, tmp_path: Path) -> None:
    """Also where llama.cpp reads none, so that nothing of the file is left out."""
    head = torch.randn(variants.VOCAB, 64, generator=torch.Generator().manual_seed(3))
    path = write(case, tmp_path, tensors={"output.weight": head.numpy()})
    weights = load_base(str(path), torch.float32, tmp_path / "cache").weights
    assert torch.equal(weights.lm_head, head)


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"),
    [("gemma2", 26, 32), ("gemma2", 46, 16), ("gemma3", 46, 32), ("gemma3", 62, 16)],
)
def test_the_largest_gemmas_scale_queries_by_the_stream(
    architecture: str, layers: int, scalar: int
) -> None:
    """The scale is in no file: llama.cpp identifies the models by their numbers of layers."""
    stated = gguf_files.settings(cases.built(architecture)) | {"~.block_count": layers}
    metadata = {key.replace("~", architecture): v for key, v in stated.items() if v is not None}
    settings = GgufSettings(Path("m.gguf"), architecture, metadata)
    tensors = [f"t{i}" for i in range(100)]
    config = config_of(settings, ARCHITECTURES[architecture], tensors)
    assert config["query_pre_attn_scalar"] == scalar


def test_an_expert_or_a_part_of_quantised_tensors_is_read_alone(tmp_path: Path) -> None:
    model = cases.build("qwen3-moe")
    name = "blk.1.ffn_down_exps.weight"
    packed = quantize(gguf_files.converted(model)[name], GGMLQuantizationType.Q8_0)
    path = gguf_files.write_model(model, tmp_path / "m.gguf", tensors={name: packed})
    source, whole = GgufSource(path), dequantize(packed, GGMLQuantizationType.Q8_0)
    for expert in range(len(whole)):
        ours = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(source.read(ours), torch.from_numpy(whole[expert]))
        assert source.info(ours).shape == whole.shape[1:]
        assert source.info(ours).nbytes == packed[expert].nbytes
