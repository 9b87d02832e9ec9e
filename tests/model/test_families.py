"""Configurations become decoders, or are refused with the reason and what would work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loraplex_model.base.families import FAMILIES, Family
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import Refusal
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model import tiny


def raw(variant: str, **changes: object) -> dict[str, object]:
    return tiny.build(variant).config.to_dict() | {"architectures": None} | changes


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_rotary_frequencies_are_transformers_own(variant: str) -> None:
    config = tiny.build(variant).config
    found = decoder_config(raw(variant))
    theirs = LlamaRotaryEmbedding(config)
    assert torch.equal(torch.tensor(found.rope_inv_freq), theirs.inv_freq)
    assert found.rope_scale == theirs.attention_scaling


def test_older_spellings_of_rope_scaling_are_read() -> None:
    older = raw("llama")
    del older["rope_parameters"]
    older |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    expected = decoder_config(raw("llama", rope_parameters=newer))
    assert decoder_config(older) == expected


@pytest.mark.parametrize(
    ("variant", "windows"),
    [
        ("llama", (None, None, None)),
        ("mistral", (None, None, None)),
        ("mistral-window", (7, 7, 7)),
        ("qwen2", (None, None, None)),
        ("qwen2-window", (None, 9, 9)),
        ("qwen3-window-bias", (5, None, 5)),
    ],
)
def test_sliding_windows_by_layer(variant: str, windows: tuple[int | None, ...]) -> None:
    assert decoder_config(raw(variant)).sliding_windows == windows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map"),
    ],
)
def test_other_architectures_are_refused_with_the_supported_ones(
    changes: dict[str, object], says: str
) -> None:
    with pytest.raises(Refusal) as caught:
        decoder_config(raw("llama", **changes))
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    assert says in caught.value.message
    assert all(name in caught.value.message for name in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "relu2"}, "relu2"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_the_decoder_lacks_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(Refusal, match=says) as caught:
        decoder_config(raw("llama", **changes))
    assert caught.value.reason == "MODEL_UNSUPPORTED"


def test_a_malformed_configuration_is_a_typed_error() -> None:
    with pytest.raises(Refusal) as caught:
        decoder_config(raw("llama", hidden_size="many"))
    assert caught.value.reason == "MODEL_INVALID"


def test_a_family_that_computes_like_llama_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = replace(decoder_config(raw("llama")), architecture="OtherForCausalLM")
    monkeypatch.setitem(FAMILIES, "OtherForCausalLM", Family("llama", "other"))
    assert decoder_config(raw("llama", architectures=["OtherForCausalLM"])) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_multimodal_model_is_tied_as_the_whole_states(tied: bool) -> None:
    text = raw("mistral", tie_word_embeddings=not tied)
    whole = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "tie_word_embeddings": tied,
    }
    assert decoder_config(whole).tie_embeddings == tied


def test_a_multimodal_model_that_does_not_say_ties_its_head() -> None:
    text = raw("mistral", tie_word_embeddings=False)
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    assert decoder_config({**whole, "model_type": "mistral3"}).tie_embeddings


HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LOCAL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "options", "field", "value"),
    [
        ("llama", LOCAL, "sliding_windows", (None, None)),
        ("granite", LOCAL, "sliding_windows", (None, None)),
        ("mixtral", LOCAL, "sliding_windows", (6, 6)),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
            "sliding_windows",
            (6, 6),
        ),
        ("qwen3", {**LOCAL, "use_sliding_window": True}, "sliding_windows", (6, None)),
        ("llama", {"rope_parameters": HALF}, "rope_inv_freq", 8),
        ("stablelm", {"rope_parameters": HALF}, "rope_inv_freq", 4),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}, "attention_softcap", 0.0),
        ("gemma2", {"attn_logit_softcapping": 2.0}, "attention_softcap", 2.0),
    ],
)
def test_an_entry_counts_only_in_families_that_read_it(
    kind: str, options: dict[str, Any], field: str, value: object
) -> None:
    """As in transformers, which ignores it elsewhere."""
    names = {family.model_type: name for name, family in FAMILIES.items()}
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = CONFIG_MAPPING[kind](**shape, num_key_value_heads=2, head_dim=16).to_dict()
    found = getattr(decoder_config({**config, "architectures": [names[kind]], **options}), field)
    assert (len(found) if field == "rope_inv_freq" else found) == value


def test_a_part_of_a_head_is_not_scaled_in_families_that_rotate_all() -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(Refusal, match="partial_rotary_factor is not supported for a llama"):
        decoder_config(raw("llama", rope_parameters=rope))


def test_mistral_with_kinds_of_layers_is_ministral() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    found = decoder_config(raw("mistral", sliding_window=6, layer_types=kinds))
    assert found.architecture == "MinistralForCausalLM"
    assert found.sliding_windows == (6, None, 6)
    other = raw("mistral", layer_types=kinds, architectures=["MistralForTokenClassification"])
    with pytest.raises(Refusal, match="MistralForTokenClassification is not supported"):
        decoder_config(other)
