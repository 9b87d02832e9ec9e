"""Weights files: anything but a LoRA of this base is refused before or while it is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters.adapter_files import (
    BASE,
    BASE_JSON,
    Entry,
    base_info,
    entries,
    everywhere,
    key,
    lora_config,
    lora_tensors,
    safetensors_bytes,
    weights_bytes,
    write_adapter,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loraplex_adapters.format.examine import examine, examine_header, inspect
from loraplex_adapters.format.header import MAX_HEADER_BYTES, read_header
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.refusal import Refusal

TENSORS = lora_tensors(everywhere("q_proj", "v_proj"))
SOUND = weights_bytes(TENSORS)
FIRST, SECOND = list(TENSORS)[:2]
DATA = b"".join(t.tobytes() for t in TENSORS.values())


def edited(**changes: object) -> bytes:
    """A valid file with changes to its first tensor's entry."""

    def change(table: dict[str, Entry]) -> None:
        table[FIRST].update(changes)

    return weights_bytes(TENSORS, change)


def with_header(header: object) -> bytes:
    return safetensors_bytes(header, DATA)


def twice() -> bytes:
    text = json.dumps(entries(TENSORS))
    first = json.dumps({FIRST: entries(TENSORS)[FIRST]})[1:-1]
    return with_header((text[:-1] + ", " + first + "}").encode())


def empty_tensors(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return safetensors_bytes({f"t{n}": entry for n in range(count)}, b"")


HOSTILE: dict[str, bytes | Callable[[], bytes]] = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header beyond the end": (1000).to_bytes(8, "little") + b"{}",
    "no header": safetensors_bytes(b"", DATA),
    "a header that is a list": with_header([1]),
    "a header after a space": with_header(b" " + json.dumps(entries(TENSORS)).encode()),
    "no tensors": safetensors_bytes({}, b""),
    "metadata alone": safetensors_bytes({"__metadata__": {"format": "pt"}}, b""),
    "metadata that is no text": with_header({"__metadata__": {"a": 1}, **entries(TENSORS)}),
    "a header bomb": lambda: safetensors_bytes(b"{" + b" " * MAX_HEADER_BYTES + b"}", b""),
    "a million list items": lambda: safetensors_bytes(b'{"a":[' + b"1," * 400_000 + b"1]}", b""),
    "9,000 tensors": lambda: empty_tensors(9_000),
    "80,000 empty tensors": lambda: empty_tensors(80_000),
    "deep nesting": safetensors_bytes(b'{"a":' + b"[" * 100_000, b""),
    "a duplicate tensor": twice,
    "truncated by one byte": SOUND[:-1],
    "a byte too many": SOUND + b"\0",
    "an empty tensor": edited(shape=[0, 32], data_offsets=[0, 0]),
    "a negative dimension": edited(shape=[-4, -32]),
    "a dimension that is true": edited(shape=[True, 128]),
    "a dimension that is a float": edited(shape=[4.0, 32]),
    "a shape that is a number": edited(shape=128),
    "a shape of no dimension": edited(shape=[]),
    "nine dimensions": edited(shape=[4, 32, 1, 1, 1, 1, 1, 1, 1]),
    "a shape that overflows 64 bits": edited(shape=[2**62, 2**62]),
    "a shape larger than its bytes": edited(shape=[5, 32]),
    "overlapping offsets": edited(data_offsets=[256, 768]),
    "a negative offset": edited(data_offsets=[-512, 0]),
    "offsets the wrong way round": edited(data_offsets=[512, 0]),
    "three offsets": edited(data_offsets=[0, 512, 512]),
    "an extra word": edited(stride=[1]),
    "a dtype that is a list": edited(dtype=["F32"]),
    "an entry that is null": with_header({**entries(TENSORS), FIRST: None}),
    "a long name": with_header({**entries(TENSORS), "x" * 600: entries(TENSORS)[FIRST]}),
    "a gap": lambda: weights_bytes(TENSORS, lambda t: t.pop(SECOND)),
    "one tensor twice under two names": lambda: weights_bytes(
        TENSORS, lambda t: t.update(other=t[FIRST])
    ),
}


@pytest.mark.parametrize("weights", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_not_exactly_its_header_is_refused(
    weights: bytes | Callable[[], bytes], tmp_path: Path
) -> None:
    data = weights if isinstance(weights, bytes) else weights()
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, weights=data), BASE)
    assert refused.value.reason == "ADAPTER_INVALID"
    assert len(refused.value.message) < 600


@pytest.mark.parametrize("dtype", ["F64", "I8", "I32", "BOOL", "F8_E4M3", "f32", "", "U64"])
def test_other_dtypes_are_refused_with_the_tensors_name(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, weights=edited(dtype=dtype)), BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_UNSUPPORTED", FIRST)


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x80\x02}q\0c", b"\x80\x04\x95\x1b\0\0\0\0\0"])
def test_a_pickle_under_the_right_name_is_recognised(magic: bytes, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="pickle") as refused:
        inspect(write_adapter(tmp_path, weights=magic + b"\x01" * 100), BASE)
    assert refused.value.reason == "ADAPTER_UNSUPPORTED"


@given(st.data())
def test_what_is_accepted_the_library_reads_alike(data: st.DataObject) -> None:
    """Our reader may be stricter than safetensors, never laxer, and reads the same bytes."""
    from safetensors.numpy import load

    mutated = bytearray(SOUND)
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(0, len(SOUND) - len(DATA) + 8))
        mutated[position] = data.draw(st.integers(0, 255))
    try:
        header = read_header(lambda at, n: bytes(mutated[at : at + n]), len(mutated))
    except Refusal:
        return
    tensors = load(bytes(mutated))
    assert {t.name: t.shape for t in header.tensors} == {n: t.shape for n, t in tensors.items()}
    for location in header.tensors:
        if location.dtype != "BF16":
            assert bytes(mutated[location.start : location.end]) == tensors[location.name].tobytes()


@example(SOUND)
@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_but_the_typed_error(data: bytes) -> None:
    try:
        header = read_header(lambda at, n: data[at : at + n], len(data))
    except Refusal:
        return
    assert header.tensors[-1].end == len(data)


PROBE = """
import sys
from pathlib import Path
import msgspec
from loraplex_adapters.format.examine import examine
from loraplex_model.base.info import BaseInfo
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
base = msgspec.json.decode(sys.argv[2], type=BaseInfo)
examine(Path(sys.argv[1]), base)
for directory in sys.argv[3:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    report = examine(Path(directory), base)
    assert report.findings, directory
    print(peak() - before)
assert "torch" not in sys.modules
assert "safetensors" not in sys.modules
"""


def test_bombs_cost_little_memory_and_no_torch(tmp_path: Path) -> None:
    bombs = {
        "spaces": safetensors_bytes(b"{" + b" " * (50 << 20) + b"}", b""),
        "tensors": empty_tensors(9_000),
        "items": safetensors_bytes(b'{"a":[' + b"[]," * 300_000 + b"[]]}", b""),
        "metadata": safetensors_bytes({"__metadata__": {"a": "x" * (90 << 20)}}, b""),
        "keys": safetensors_bytes({"__metadata__": {f"{n}": "" for n in range(60_000)}}, b""),
    }
    directories = [write_adapter(tmp_path / n, weights=w) for n, w in bombs.items()]
    sound = write_adapter(tmp_path / "sound")
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, str(sound), BASE_JSON, *map(str, directories)],
        check=True,
        capture_output=True,
        text=True,
    )
    for bomb, extra in zip(bombs, ran.stdout.split(), strict=True):
        assert int(extra) < 24 << 10, f"{bomb}: {extra} KiB"


def changed(name: str, position: int, value: float) -> bytes:
    tensors = {n: t.copy() for n, t in TENSORS.items()}
    tensors[name].reshape(-1)[position] = value
    return weights_bytes(tensors)


LAST = list(TENSORS)[-1]


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 1e38, -65505.0])
@pytest.mark.parametrize(("name", "position"), [(FIRST, 0), (FIRST, -1), (LAST, 0), (LAST, -1)])
def test_an_element_that_is_not_finite_or_too_large_is_found(
    name: str, position: int, value: float, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, weights=changed(name, position, value)), BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", name)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 65504.0, -65504.0])
def test_elements_at_the_bounds_pass(value: float, tmp_path: Path) -> None:
    assert inspect(write_adapter(tmp_path, weights=changed(LAST, -1, value)), BASE).rank == 4


HALF_BITS = {
    "F16": {
        "good": [0x0000, 0x8000, 0x0001, 0x7BFF, 0xFBFF],
        "bad": [0x7C00, 0xFC00, 0x7E00, 0xFFFF],
    },
    "BF16": {
        "good": [0x0000, 0x8000, 0x0001, 0x477F, 0xC77F],
        "bad": [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F, 0x4780],
    },
}


@pytest.mark.parametrize("dtype", HALF_BITS)
@pytest.mark.parametrize("position", [0, -1])
def test_half_precision_elements_are_judged_by_their_bits(
    dtype: str, position: int, tmp_path: Path
) -> None:
    name = key(0, "q_proj", "A")
    for verdict, patterns in HALF_BITS[dtype].items():
        for bits in patterns:
            halves = {n: np.zeros(t.shape, np.uint16) for n, t in TENSORS.items()}
            halves[name].reshape(-1)[position] = bits
            table = entries(halves)  # type: ignore[arg-type]
            for entry in table.values():
                entry["dtype"] = dtype
            data = safetensors_bytes(table, b"".join(h.tobytes() for h in halves.values()))
            report = examine(write_adapter(tmp_path, weights=data), BASE)
            assert bool(report.findings) == (verdict == "bad"), (verdict, hex(bits))


def test_tensors_larger_than_a_piece_are_checked_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_adapters.format.values.PIECE", 64)
    for position in (0, 15, 16, 17, -1):
        source = write_adapter(tmp_path, weights=changed(FIRST, position, np.nan))
        assert examine(source, BASE).findings[0].field == FIRST
    whole = inspect(write_adapter(tmp_path), BASE).digest
    monkeypatch.undo()
    assert inspect(tmp_path, BASE).digest == whole


def renamed(old: str, new: str) -> bytes:
    return weights_bytes({new if n == old else n: t for n, t in TENSORS.items()})


B_KEY = key(1, "v_proj", "B")
A_KEY = key(1, "v_proj", "A")
PREFIX = "base_model.model.model.layers.1.self_attn.v_proj"

STRAY: list[tuple[str, str]] = [
    (
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight",
        "ADAPTER_INVALID",
    ),
    ("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.layers.99999.self_attn.v_proj.lora_B.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.layers.01.self_attn.v_proj.lora_B.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.layers.1.mlp.v_proj.lora_B.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.layers.1.self_attn.x_proj.lora_B.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight\n", "ADAPTER_INVALID"),
    ("model.layers.1.self_attn.v_proj.lora_B.weight", "ADAPTER_INVALID"),
    ("../../etc/passwd", "ADAPTER_INVALID"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.embed_tokens.lora_B.weight", "ADAPTER_INVALID"),
    (f"{PREFIX}.lora_magnitude_vector", "ADAPTER_INVALID"),
    (f"{PREFIX}.lora_B.bias", "ADAPTER_INVALID"),
    (f"{PREFIX}.bias", "ADAPTER_INVALID"),
    (f"{PREFIX}.base_layer.bias", "ADAPTER_INVALID"),
    (f"{PREFIX}.base_layer.weight", "BASE_MODEL_MISMATCH"),
    (f"{PREFIX}.weight", "BASE_MODEL_MISMATCH"),
    (f"{PREFIX}.ia3_l", "ADAPTER_INVALID"),
    ("base_model.model.model.norm.weight", "ADAPTER_INVALID"),
    ("base_model.model.lm_head.weight", "BASE_MODEL_MISMATCH"),
    ("base_model.model.model.embed_tokens.weight", "BASE_MODEL_MISMATCH"),
    ("prompt_embeddings", "ADAPTER_INVALID"),
]


@pytest.mark.parametrize(("name", "reason"), STRAY)
def test_a_tensor_without_a_place_in_this_base_fails_the_load(
    name: str, reason: str, tmp_path: Path
) -> None:
    report = examine(write_adapter(tmp_path, weights=renamed(B_KEY, name)), BASE)
    assert report.spec is None
    assert reason in {f.reason for f in report.findings if f.field == name.replace("\n", "\\n")}


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half_fails_the_load(half: str, tmp_path: Path) -> None:
    lost = key(1, "v_proj", half)
    tensors = {n: t for n, t in TENSORS.items() if n != lost}
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, weights=tensors), BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", lost)


def reshaped(name: str, *shape: int) -> bytes:
    tensors = dict(TENSORS)
    tensors[name] = np.zeros(shape, np.float32)
    return weights_bytes(tensors)


@pytest.mark.parametrize(
    ("weights", "reason", "field"),
    [
        (reshaped(A_KEY, 4, 33), "BASE_MODEL_MISMATCH", A_KEY),
        (reshaped(B_KEY, 17, 4), "BASE_MODEL_MISMATCH", B_KEY),
        (reshaped(A_KEY, 32, 4), "BASE_MODEL_MISMATCH", A_KEY),
        (reshaped(B_KEY, 16, 5), "ADAPTER_INVALID", B_KEY),
        (reshaped(A_KEY, 128), "ADAPTER_INVALID", A_KEY),
        (reshaped(A_KEY, 1, 4, 32), "ADAPTER_INVALID", A_KEY),
        (
            weights_bytes(lora_tensors(everywhere("q_proj", "v_proj", rank=5))),
            "ADAPTER_INVALID",
            "r",
        ),
    ],
)
def test_shapes_have_to_be_those_of_the_base_and_the_rank(
    weights: bytes, reason: str, field: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, weights=weights), BASE)
    assert (refused.value.reason, refused.value.field) == (reason, field)


def test_a_rank_bomb_is_refused_before_its_bytes_are_read(tmp_path: Path) -> None:
    rank = 1 << 20
    table: dict[str, Entry] = {
        key(0, "q_proj", "A"): {
            "dtype": "F32",
            "shape": [rank, 32],
            "data_offsets": [0, rank * 128],
        },
        key(0, "q_proj", "B"): {
            "dtype": "F32",
            "shape": [32, rank],
            "data_offsets": [rank * 128, rank * 256],
        },
    }
    source = write_adapter(tmp_path, lora_config(target_modules="x"), safetensors_bytes(table, b""))
    file = source / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size + rank * 256)  # sparse: reading it would be all zeros
    with pytest.raises(Refusal) as refused:
        inspect(source, BASE)
    assert refused.value.reason == "RANK_TOO_LARGE"


def test_an_adapter_of_a_shallower_base_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    shallow = lora_tensors(everywhere("q_proj", "v_proj", layers=1))
    with pytest.raises(Refusal, match="fewer layers") as refused:
        inspect(write_adapter(tmp_path, weights=shallow), BASE)
    assert refused.value.reason == "BASE_MODEL_MISMATCH"


def test_a_stamped_adapter_serves_on_its_own_base_only(tmp_path: Path) -> None:
    table: dict[str, object] = {"__metadata__": {"loraplex_base_fingerprint": BASE.fingerprint}}
    stamped = safetensors_bytes({**table, **entries(TENSORS)}, DATA)
    assert inspect(write_adapter(tmp_path, weights=stamped), BASE).rank == 4
    twin = replace(BASE, fingerprint="sha256:" + "1" * 64)
    with pytest.raises(Refusal) as refused:
        inspect(tmp_path, twin)
    assert refused.value.reason == "BASE_MODEL_MISMATCH"
    assert refused.value.field == "loraplex_base_fingerprint"


def test_thousands_of_findings_of_one_kind_become_one_and_a_report_of_others_ends(
    tmp_path: Path,
) -> None:
    tensors = {f"stray.{n}": np.zeros((1, 1), np.float32) for n in range(3000)}
    (only,) = examine(write_adapter(tmp_path / "tensors", weights=tensors), BASE).findings
    assert (only.reason, only.field) == ("ADAPTER_INVALID", "stray.0")
    assert "3000 tensors" in only.message
    unknown = lora_config() | {f"unknown_{n}": True for n in range(3000)}
    folder = write_adapter(tmp_path / "options", unknown)
    assert len(examine(folder, BASE).findings) == 100


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_adapter_is_served_whole_or_described(
    data: st.DataObject, tmp_path: Path
) -> None:
    files = {"config": json.dumps(lora_config()).encode(), "weights": SOUND}
    for name, sound in files.items():
        mutated = bytearray(sound)
        for _ in range(data.draw(st.integers(0, 2))):
            start = data.draw(st.integers(0, min(len(sound), 900)))
            mutated[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        files[name] = bytes(mutated)
    report = examine(write_adapter(tmp_path, files["config"], files["weights"]), BASE)
    assert (report.spec is None) == bool(report.findings)
    if report.spec:
        held = read_header(lambda at, n: files["weights"][at : at + n], len(files["weights"]))
        assert {t for m in report.spec.modules for t in m.tensors.values()} == set(held.tensors)


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_the_digest_keeps_the_files_apart(config: bytes, first: bytes, second: bytes) -> None:
    from loraplex_adapters.format.digest import AdapterDigest

    def digest(config: bytes, *pieces: bytes) -> str:
        made = AdapterDigest(config, sum(map(len, pieces)))
        for piece in pieces:
            made.update(piece)
        return made.text()

    assert digest(config, first, second) == digest(config, first + second)
    if first:
        assert digest(config + first, second) != digest(config, first + second)


def test_a_file_of_more_than_4_gib_is_read_if_the_limit_allows_it(tmp_path: Path) -> None:
    large = base_info(vocab_size=(1 << 25) + 1)
    config = lora_config(modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.weight"
    table = entries(lora_tensors(everywhere("q_proj", "v_proj")))
    start = max(entry["data_offsets"][1] for entry in table.values())  # type: ignore[index]
    shape = [large.config.vocab_size, large.config.hidden_size]
    end = start + 4 * shape[0] * shape[1]
    table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    head = safetensors_bytes(table, b"")
    source = write_adapter(tmp_path, config, head)
    os.truncate(source / "adapter_model.safetensors", len(head) + end)  # a hole, no bytes
    (found,) = examine_header(source, large).findings
    assert found.reason == "ADAPTER_TOO_LARGE"
    assert "max_adapter_file" in found.message
    spec = examine_header(source, large, AdapterLimits(max_weights_bytes=5 << 30)).spec
    assert spec is not None
    assert spec.size_bytes > 4 << 30
