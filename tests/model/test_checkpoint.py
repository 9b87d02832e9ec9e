"""Checkpoints of every kind load to the same model; damaged ones say what is wrong."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints import checkpoint
from loraplex_model.checkpoints.checkpoint import SafetensorsSource, TensorInfo
from loraplex_model.checkpoints.convert import convert
from loraplex_model.checkpoints.load import LoadedBase, load_base
from loraplex_model.ops import nf4
from model.conftest import Load
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from model import tiny


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(directory: Path, cache: Path, dtype: torch.dtype = torch.float32) -> LoadedBase:
    return load_base(str(directory), dtype, cache)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_shards_load_like_one_file(
    variant: str, tmp_path: Path, cache: Path, load_tiny: Load
) -> None:
    sharded = tiny.write(variant, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert load(sharded, cache).weights.fingerprint == load_tiny(variant).weights.fingerprint


@pytest.mark.parametrize("double", [True, False])
def test_an_nf4_checkpoint_is_taken_as_it_is(double: bool, tmp_path: Path, cache: Path) -> None:
    plain = tiny.write("llama", tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "nf4")
    weights = load(tmp_path / "nf4", cache).weights
    if double:
        assert weights.fingerprint == load(plain, cache).weights.fingerprint
    else:
        assert weights.layers[0].qkv.absmax.dtype == torch.float32
    for i, layer in enumerate(weights.layers):
        block = model.model.layers[i]
        parts = [
            getattr(block.self_attn if name[0] in "qkvo" else block.mlp, name).weight
            for name in PROJECTIONS
        ]
        theirs = [_unpack(part) for part in parts]
        assert torch.equal(nf4.dequantize(layer.qkv), torch.cat(theirs[:3]))
        assert torch.equal(nf4.dequantize(layer.o), theirs[3])
        assert torch.equal(nf4.dequantize(layer.gate_up), torch.cat(theirs[4:6]))
        assert torch.equal(nf4.dequantize(layer.down), theirs[6])


def _unpack(parameter: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    unpacked: torch.Tensor = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
    return unpacked


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
    ids=str,
)
def test_other_quantisations_are_refused(
    quantisation: dict[str, object], tmp_path: Path, cache: Path
) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    _edit(directory, quantization_config=quantisation)
    with pytest.raises(Refusal, match="only bitsandbytes NF4") as caught:
        load(directory, cache)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


def test_another_block_size_is_refused(tmp_path: Path, cache: Path) -> None:
    import bitsandbytes as bnb
    from safetensors.torch import save_file

    directory = tiny.write("llama", tmp_path / "model")
    state = tiny.build("llama").state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    packed, quant = bnb.functional.quantize_4bit(state[name], blocksize=128, quant_type="nf4")
    state[name] = packed
    state |= {f"{name}.{key}": value for key, value in quant.as_dict(packed=True).items()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="block size 128") as caught:
        load(directory, cache)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


class CountingSource:
    """Counts the tensors that are alive at once, from the first read on."""

    def __init__(self, inner: SafetensorsSource) -> None:
        self.config, self.generation_config = inner.config, inner.generation_config
        self.rope_divisors = inner.rope_divisors
        self.has_tokenizer = inner.has_tokenizer
        self._inner = inner
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def names(self):
        return self._inner.names()

    def info(self, name: str) -> TensorInfo:
        return self._inner.info(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._inner.read(name)
        if tensor.ndim == 2:
            self.alive.add(tensor)
            self.most = max(self.most, len(self.alive))
        return tensor


def test_one_dense_matrix_is_held_at_a_time(tmp_path: Path) -> None:
    directory = tiny.write("qwen3", tmp_path / "model")
    source = CountingSource(SafetensorsSource(directory))
    convert(source, tmp_path / "out.safetensors")
    assert source.most == 1


def test_dense_tensors_are_of_the_compute_dtype(load_tiny: Load) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights = load_tiny("qwen3-window-bias", dtype).weights
        layer = weights.layers[0]
        dense = (weights.embed, weights.norm, layer.input_norm, layer.q_norm, layer.qkv_bias)
        assert all(tensor is not None and tensor.dtype == dtype for tensor in dense)
        assert weights.lm_head is weights.embed
    assert load_tiny("llama").weights.fingerprint == (
        load_tiny("llama", torch.bfloat16).weights.fingerprint
    )


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path, cache: Path) -> None:
    one = load(tiny.write("llama", tmp_path / "one"), cache).weights.fingerprint
    other = load(tiny.write("llama", tmp_path / "other", seed=1), cache).weights.fingerprint
    assert one != other
    assert one.startswith("sha256:")
    assert len(one) == 71


def test_generation_config_names_the_ends(tmp_path: Path, cache: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load(directory, cache).weights.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("damage", "reason", "says"),
    [
        ("absent", "MODEL_NOT_FOUND", "no model at"),
        ("empty", "MODEL_INVALID", "neither"),
        ("no config", "MODEL_INVALID", "config.json"),
        ("bad config", "MODEL_INVALID", "config.json"),
        ("no weights", "MODEL_INVALID", "model.safetensors"),
        ("pickle", "MODEL_UNSUPPORTED", "pickled"),
        ("cut short", "MODEL_INVALID", "cut short"),
        ("missing shard", "MODEL_INVALID", "missing"),
        ("shard outside", "MODEL_INVALID", "outside"),
        ("missing tensor", "MODEL_INVALID", "no tensor"),
        ("wrong shape", "MODEL_INVALID", "needs"),
        ("a text file", "MODEL_UNSUPPORTED", "neither a directory nor"),
    ],
)
def test_damage_is_named(damage: str, reason: str, says: str, tmp_path: Path, cache: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model", max_shard_size="100KB")
    shard = min(directory.glob("model-*.safetensors"))
    match damage:
        case "absent":
            directory = tmp_path / "nowhere"
        case "empty":
            directory = tmp_path / "empty"
            directory.mkdir()
        case "no config":
            (directory / "config.json").unlink()
        case "bad config":
            (directory / "config.json").write_text("{")
        case "no weights" | "pickle":
            for file in directory.glob("*.safetensors*"):
                file.unlink()
            if damage == "pickle":
                (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        case "cut short":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "missing shard":
            shard.unlink()
        case "shard outside":
            index = directory / checkpoint.INDEX
            index.write_text(index.read_text().replace(shard.name, "../x.safetensors"))
        case "missing tensor":
            _edit(directory, num_hidden_layers=4)
        case "wrong shape":
            _edit(directory, intermediate_size=96)
        case "a text file":
            directory = tmp_path / "notes.txt"
            directory.write_text("hello")
    with pytest.raises(Refusal, match=says) as caught:
        load(directory, cache)
    assert caught.value.reason == reason


def test_a_path_never_asks_a_hub(tmp_path: Path, cache: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    load(tiny.write("llama", tmp_path / "model"), cache)
    for missing in (str(tmp_path / "none"), "./some/where", "none.gguf", "~/model"):
        with pytest.raises(Refusal) as caught:
            load_base(missing, torch.float32, cache)
        assert caught.value.reason == "MODEL_NOT_FOUND"


def test_an_id_that_a_hub_cannot_give_is_a_typed_error(cache: Path, monkeypatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(Refusal, match="no route") as caught:
        load_base("owner/name", torch.float32, cache)
    assert caught.value.reason == "MODEL_UNAVAILABLE"


def _edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
