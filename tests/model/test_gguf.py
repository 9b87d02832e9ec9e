"""GGUF files give the tensors and the configuration that transformers gives."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints import checkpoint
from loraplex_model.checkpoints.gguf import header
from loraplex_model.checkpoints.gguf.source import GgufSource
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops import nf4
from model.conftest import Load

from model import gguf_files, tiny


def load(path: Path, cache: Path):
    return load_base(str(path), torch.float32, cache).weights


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied-bias", "llama-rope-llama3", "mistral", "qwen2", "qwen3"]
)
def test_a_gguf_file_loads_like_its_safetensors(
    variant: str, tmp_path: Path, load_tiny: Load
) -> None:
    ours = load(gguf_files.write(variant, tmp_path / "m.gguf"), tmp_path / "cache")
    expected = load_tiny(variant).weights
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


_YARN = {
    "~.rope.scaling.type": "yarn",
    "~.rope.scaling.factor": 4.0,
    "~.rope.scaling.original_context_length": 64,
}


@pytest.mark.parametrize(
    ("keys", "variant"),
    [
        ({"~.rope.scaling.type": "linear", "~.rope.scaling.factor": 2.0}, "llama-rope-linear"),
        ({"~.rope.scaling.factor": 2.0}, "llama-rope-linear"),
        ({"~.rope.scale_linear": 2.0}, "llama-rope-linear"),
        (_YARN, "llama-rope-yarn"),
        (_YARN | {"~.rope.scaling.yarn_ext_factor": 1.0}, "llama-rope-yarn"),
        (_YARN | {"~.rope.scaling.yarn_attn_factor": 1.1386294}, "llama-rope-yarn"),
        (_YARN | {"~.rope.scaling.yarn_beta_fast": 32.0}, "llama-rope-yarn"),
        ({"~.rope.scaling.type": "none", "~.rope.scaling.factor": 2.0}, "llama"),
        ({"~.rope.scaling.type": "linear"}, "llama"),
        ({"~.rope.freq_base": None, "~.rope.dimension_count": None}, "llama"),
    ],
)
def test_scaled_positions_are_those_of_config_json(
    keys: dict[str, Any], variant: str, tmp_path: Path, load_tiny: Load
) -> None:
    ours = load(gguf_files.write("llama", tmp_path / "m.gguf", keys), tmp_path / "cache").config
    expected = load_tiny(variant).weights.config
    assert ours.rope_inv_freq == expected.rope_inv_freq
    assert ours.rope_scale == pytest.approx(expected.rope_scale, rel=1e-6)


def test_yarns_factors_on_cosine_and_sine_are_llama_cpps(tmp_path: Path) -> None:
    cases = {
        "attn_factor": ({"~.rope.scaling.attn_factor": 0.5}, 0.5 * 1.1386294),
        "log_multiplier": ({"~.rope.scaling.yarn_log_multiplier": 1.0}, 1.0),
        "half": ({"~.rope.scaling.yarn_log_multiplier": 0.5}, 1.1386294 / 1.0693147),
        "beta": (
            {"~.rope.scaling.yarn_beta_fast": 16.0, "~.rope.scaling.yarn_beta_slow": 2.0},
            1.1386294,
        ),
    }
    for name, (keys, scale) in cases.items():
        source = GgufSource(gguf_files.write("llama", tmp_path / f"{name}.gguf", _YARN | keys))
        assert source.config["rope_parameters"]["attention_factor"] == pytest.approx(scale)
    assert source.config["rope_parameters"]["beta_fast"] == 16
    assert source.config["rope_parameters"]["beta_slow"] == 2


@pytest.mark.parametrize("parts", [1, 5, 12])
def test_a_split_model_is_read_from_any_of_its_parts(parts: int, tmp_path: Path) -> None:
    whole = load(gguf_files.write("qwen2", tmp_path / "m.gguf"), tmp_path / "cache")
    gguf_files.write("qwen2", tmp_path / "s.gguf", parts=parts)
    files = sorted(tmp_path.glob("s-*.gguf"))
    assert len(files) > 2
    for file in (files[0], files[1], files[-1]):
        assert checkpoint.locate(str(file)) == files[0]
        assert checkpoint.files_of(file) == tuple(files)
        ours = load(file, tmp_path / "cache")
        assert ours.fingerprint == whole.fingerprint
        assert ours.eos_token_ids == (2,)
    assert GgufSource(files[-1]).config == GgufSource(files[0]).config


def test_a_split_models_cache_depends_on_every_part(tmp_path: Path) -> None:
    gguf_files.write("qwen2", tmp_path / "s.gguf", parts=20)
    files = sorted(tmp_path.glob("s-*.gguf"))
    before = load(files[0], tmp_path / "cache").fingerprint
    content = bytearray(files[-1].read_bytes())
    content[-3] ^= 1
    files[-1].write_bytes(content)
    assert load(files[0], tmp_path / "cache").fingerprint != before


def test_a_missing_or_exchanged_part_is_named(tmp_path: Path) -> None:
    for name, parts in (("s", 12), ("t", 20)):
        gguf_files.write("qwen2", tmp_path / f"{name}.gguf", parts=parts)
    files, others = sorted(tmp_path.glob("s-*.gguf")), sorted(tmp_path.glob("t-*.gguf"))
    second = files[1].read_bytes()

    def refused(path: Path, says: str) -> None:
        with pytest.raises(Refusal, match=says) as caught:
            load(path, tmp_path / "cache")
        assert caught.value.reason == "MODEL_INVALID"

    files[1].write_bytes(others[1].read_bytes())
    refused(files[0], r"s-00002-of-\d+\.gguf is named as part 2 of")
    files[1].write_bytes(files[2].read_bytes())
    refused(files[0], r"s-00002-of-\d+\.gguf is named as part 2 of \d, but it is part 3 of")
    files[1].write_bytes(gguf_files.write("qwen2", tmp_path / "w.gguf").read_bytes())
    refused(files[2], "named as part 2 of .*, but it is a whole model")
    files[1].unlink()
    refused(files[0], r"s-00002-of-\d+\.gguf is missing")
    refused(files[2], r"s-00002-of-\d+\.gguf is missing")
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(second)
    refused(alone, r"named as a whole model, but it is part 2 of .*NAME-00002-of-0000")
    files[0].unlink()
    refused(files[2], r"s-00001-of-\d+\.gguf is missing")


def test_the_parts_of_a_split_model_hold_all_its_tensors(tmp_path: Path) -> None:
    gguf_files.write("qwen2", tmp_path / "s.gguf", parts=12)
    files = sorted(tmp_path.glob("s-*.gguf"))
    key = b"split.tensors.count" + struct.pack("<I", 5)
    for file in files:
        head, _, rest = file.read_bytes().partition(key)
        (total,) = struct.unpack_from("<i", rest)
        file.write_bytes(head + key + struct.pack("<i", total + 1) + rest[4:])
    with pytest.raises(Refusal, match=f"states {total + 1} tensors in all parts") as caught:
        GgufSource(files[0])
    assert caught.value.reason == "MODEL_INVALID"


def test_no_two_parts_hold_the_same_tensor(tmp_path: Path) -> None:
    gguf_files.write("qwen2", tmp_path / "s.gguf", parts=12)
    files = sorted(tmp_path.glob("s-*.gguf"))
    content = files[1].read_bytes()
    names = [name for name in header.read_file(files[1]).tensors if name.endswith("attn_q.bias")]
    other = names[0].replace(names[0][4], "0").encode()
    assert other.decode() in header.read_file(files[0]).tensors
    files[1].write_bytes(content.replace(names[0].encode(), other))
    with pytest.raises(Refusal, match=f"repeats {other.decode()}") as caught:
        GgufSource(files[0])
    assert caught.value.reason == "MODEL_INVALID"


def test_a_directory_of_gguf_files_says_to_give_one(tmp_path: Path) -> None:
    path = gguf_files.write("qwen2", tmp_path / "m.gguf")
    with pytest.raises(Refusal, match=f"give one of them, such as {path}") as caught:
        load(tmp_path, tmp_path / "cache")
    assert caught.value.reason == "MODEL_INVALID"


def test_a_link_keeps_the_name_that_says_what_the_file_is(tmp_path: Path) -> None:
    """The hub's cache holds links to files that are named by their digests."""
    whole = gguf_files.write("qwen2", tmp_path / "m.gguf")
    whole.rename(tmp_path / "3f2a")
    whole.symlink_to(tmp_path / "3f2a")
    assert load(whole, tmp_path / "cache").config.architecture == "Qwen2ForCausalLM"


def _header(tensors: int, entries: int, rest: bytes = b"", fill: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest + bytes(fill)


_KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGML" + bytes(40),
        _header(1, 1),
        _header(0, 1, struct.pack("<Q", 1 << 60), 40),
        _header(0, 1, _KEY + struct.pack("<IIQ", 9, 4, 1 << 40), 40),
        _header(0, 1, _KEY + struct.pack("<IIQ", 9, 8, 1 << 23), 40),
        _header(0, 1, _KEY + struct.pack("<IIQ", 9, 9, 1), 40),
        _header(0, 1, _KEY + struct.pack("<II", 99, 0), 40),
        _header(0, 1, _KEY + struct.pack("<IQ", 8, 1 << 62), 40),
        _header(0, 2, 2 * (_KEY + struct.pack("<II", 4, 0)), 40),
        _header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<I", 1 << 30), 40),
        _header(1, 0, _KEY + struct.pack("<I4QIQ", 4, *[1 << 62] * 4, 0, 0), 40),
        _header(1 << 60, 0, fill=400),
        _header(0, 1 << 60, fill=400),
        _header(1 << 20, 0, fill=24 << 20),
        _header(0, 1 << 17, fill=13 << 17),
        _header(0, 1, struct.pack("<Q", 2) + b"\n\x1b" + struct.pack("<II", 4, 0), 40),
        _header(0, 1, struct.pack("<Q", 300) + b"k" * 300 + struct.pack("<II", 4, 0), 40),
    ],
    ids=[
        "empty", "magic", "short", "string", "array", "strings", "nested", "type", "text", "twice",
        "dimensions", "size", "tensors", "entries", "many tensors", "many entries",
        "unprintable", "long name",
    ],
)  # fmt: skip
def test_a_malformed_header_is_a_typed_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(Refusal) as caught:
        GgufSource(path)
    assert caught.value.reason == "MODEL_INVALID"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("order", ["<", ">"])
def test_other_versions_and_byte_orders_are_not_supported(order: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack(f"{order}IQQ", 1 if order == "<" else 3, 0, 0))
    says = "of GGUF version 1" if order == "<" else "big-endian"
    with pytest.raises(Refusal, match=says) as caught:
        GgufSource(path)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


def test_long_values_are_skipped_not_held(tmp_path: Path) -> None:
    keys = {"general.notes": "x" * (2 << 20), "general.numbers": [1] * 5000, "general.few": [1, 2]}
    found = header.read_file(gguf_files.write("qwen2", tmp_path / "m.gguf", keys)).metadata
    assert found["general.notes"] == header.LongValue(2 << 20)
    assert found["general.numbers"] == header.LongValue(5000)
    assert found["tokenizer.ggml.tokens"] == header.LongValue(tiny.VOCAB)
    assert found["general.few"] == [1, 2]


def test_a_file_cut_anywhere_is_a_typed_error(tmp_path: Path) -> None:
    whole = gguf_files.write("qwen3", tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for end in (*range(1, 400, 13), *range(400, len(whole), len(whole) // 20)):
        path.write_bytes(whole[:end])
        with pytest.raises(Refusal) as caught:
            GgufSource(path)
        assert caught.value.reason == "MODEL_INVALID"
