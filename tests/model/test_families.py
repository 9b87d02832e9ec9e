"""Configurations become decoders, or are refused with the reason and what would work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loraplex_model.base.families import FAMILIES, Family
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import Refusal
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
