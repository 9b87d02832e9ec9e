"""A saved copy of the base's own weight is compared with it: left out, served, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.copies import EMBED, HEAD, NORM, PREFIX, noise
from adapters.peft_files import TIED, base_info
from adapters.peft_kinds import Gallery
from loraplex_adapters.format.copies.comparing import PIECE
from loraplex_adapters.format.copies.settling import settle
from loraplex_adapters.format.examine import Report, examine, examine_header, inspect
from loraplex_adapters.format.spec import AdapterLimits, ModuleSpec
from loraplex_adapters.load.tensors import load
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops import nf4
from safetensors.torch import save_file

from model import tiny

Tensors = dict[str, torch.Tensor]
Info = Callable[[str], BaseInfo]

V_PROJ = f"{PREFIX}model.layers.1.self_attn.v_proj"
Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"
DOWN = f"{PREFIX}model.layers.2.mlp.down_proj"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
}
TYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD, UNEVEN = "llama-odd-sizes", "uneven"


@cache
def model(variant: str) -> Any:
    """A tiny model; the numbers of `UNEVEN` are not exact in 16 bits, as those of others are."""
    if variant != UNEVEN:
        return tiny.build(variant)
    made = tiny.build("llama")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(made.named_parameters()):
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=random))
    return made


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> Info:
    """Describes a base by its variant."""
    root = tmp_path_factory.mktemp("uneven")

    @cache
    def find(variant: str) -> BaseInfo:
        if variant != UNEVEN:
            return base_info(variant)
        model(variant).save_pretrained(root / "model")
        return load_base(str(root / "model"), torch.float32, root / "cache").weights.info

    return find


def own(variant: str, name: str) -> torch.Tensor:
    """A parameter of the base as its checkpoint has it, by its name in an adapter."""
    path = name.removeprefix(PREFIX).replace(".base_layer", "")
    weight: torch.Tensor = model(variant).get_parameter(path)
    return weight.detach().clone()


def lora(width: int = 64, out: int = 64, at: str = Q_PROJ) -> Tensors:
    return {
        f"{at}.lora_A.weight": noise(2, width, seed=3),
        f"{at}.lora_B.weight": noise(out, 2, seed=4),
    }


def on_head(width: int = 64) -> Tensors:
    return lora(width, tiny.VOCAB, HEAD)


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    adapted = {name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors if ".lora_" in name}
    targets = {"target_modules": sorted(adapted) or ["none"]}
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | targets | config))
    save_file(
        {name: t.clone() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return folder


def at(report: Report, module: str) -> ModuleSpec | None:
    assert report.spec is not None, report.findings
    return next((m for m in report.spec.modules if m.module == module), None)


@pytest.mark.parametrize("saved", TYPES)
@pytest.mark.parametrize("loaded", TYPES)
def test_a_copy_that_is_the_base_after_rounding_is_left_out_and_said(
    info: Info, loaded: torch.dtype, saved: torch.dtype, tmp_path: Path
) -> None:
    """The author may have loaded the base in one type and saved the file in another."""
    base = info(UNEVEN)
    name = f"{HEAD}.base_layer.weight"
    copy = own(UNEVEN, f"{HEAD}.weight").to(loaded).to(saved)
    report = examine(write(tmp_path, {**on_head(), name: copy}), base)
    head = at(report, "lm_head")
    assert head is not None
    assert set(head.tensors) == {"a", "b"}
    assert report.spec is not None
    assert [note for note in report.spec.notes if name in note and "left out" in note]
    alone = inspect(write(tmp_path / "alone", on_head()), base)
    assert report.spec.packed_bytes == alone.packed_bytes


@pytest.mark.parametrize("saved", TYPES)
def test_only_rows_that_differ_are_served(saved: torch.dtype, tmp_path: Path) -> None:
    base = base_info("llama")
    copy = own("llama", f"{HEAD}.weight")
    copy[[3, 127]] += 0.1
    name = f"{HEAD}.base_layer.weight"
    report = examine(write(tmp_path, {**on_head(), name: copy.to(saved)}), base)
    head = at(report, "lm_head")
    assert head is not None
    assert (set(head.tensors), head.changed_rows) == ({"a", "b", "weight"}, (3, 127))
    assert report.spec is not None
    assert [note for note in report.spec.notes if name in note and "2 rows" in note]
    alone = inspect(write(tmp_path / "alone", on_head()), base)
    assert report.spec.packed_bytes == alone.packed_bytes + 64 + 2 * 64 * 4


def test_rows_that_were_only_rounded_are_served_if_another_row_was_changed(
    info: Info, tmp_path: Path
) -> None:
    """PEFT computes with the rounded rows too."""
    copy = own(UNEVEN, f"{HEAD}.weight")
    copy[3] += 0.1
    tensors = {**on_head(), f"{HEAD}.base_layer.weight": copy.half()}
    head = at(examine(write(tmp_path, tensors), info(UNEVEN)), "lm_head")
    assert head is not None
    assert head.changed_rows == tuple(range(tiny.VOCAB))


def test_one_unit_in_the_last_place_is_a_difference(tmp_path: Path) -> None:
    copy = own("llama", f"{HEAD}.weight")
    copy[5, 6] = torch.nextafter(copy[5, 6], torch.tensor(9.0))
    tensors = {**on_head(), f"{HEAD}.base_layer.weight": copy}
    head = at(examine(write(tmp_path, tensors), base_info("llama")), "lm_head")
    assert head is not None
    assert head.changed_rows == (5,)


def test_one_copy_of_tied_weights_changes_embeddings_and_head(
    gallery: Gallery, tmp_path: Path
) -> None:
    copy = own(TIED, f"{EMBED}.weight")
    copy[9] = noise(128)
    tensors = {**on_head(128), f"{HEAD}.base_layer.weight": copy}
    digest = inspect(write(tmp_path, tensors), base_info(TIED)).digest
    spec, delta = load(tmp_path, digest, gallery.weights(TIED))
    assert {m.module: m.changed_rows for m in spec.modules} == {
        "embed_tokens": (9,),
        "lm_head": (9,),
    }
    for change in delta.sites.values():
        assert change.token_ids.tolist() == [9]


def test_of_two_copies_of_tied_weights_the_other_is_said_to_be_unused(tmp_path: Path) -> None:
    tensors = {
        **lora(128, 128),
        f"{EMBED}.weight": noise(tiny.VOCAB, 128, seed=1),
        f"{HEAD}.weight": noise(tiny.VOCAB, 128, seed=2),
    }
    spec = inspect(write(tmp_path, tensors), base_info(TIED))
    used = {m.tensors["weight"].name for m in spec.modules if "weight" in m.tensors}
    assert used == {f"{HEAD}.weight"}
    assert [n for n in spec.notes if n.startswith(f"{EMBED}.weight is not used")]


def quantised(weight: torch.Tensor) -> torch.Tensor:
    return nf4.dequantize(nf4.quantise(weight))


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as the checkpoint": lambda w: w,
    "in bfloat16": lambda w: w.bfloat16(),
    "in float16": lambda w: w.half(),
    "quantised": quantised,
    "quantised, in bfloat16": lambda w: quantised(w).bfloat16(),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("variant", ["llama", UNEVEN, ODD])
def test_a_copy_of_a_projection_equals_it_before_and_after_quantisation(
    info: Info, variant: str, rounding: str, tmp_path: Path
) -> None:
    base = info(variant)
    width = base.config.hidden_size
    tensors = lora(width, base.config.q_size)
    copied = [f"{Q_PROJ}.base_layer.weight", f"{V_PROJ}.weight", f"{DOWN}.weight"]
    tensors |= {n: ROUNDINGS[rounding](own(variant, n)).contiguous() for n in copied}
    spec = inspect(write(tmp_path, tensors), base)
    assert {m.module for m in spec.modules} == {"q_proj"}
    assert any("and 2 more: left out" in note for note in spec.notes)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one element": lambda w: w.index_put((torch.tensor(3), torch.tensor(5)), w.amax() / 3),
    "one block's size": lambda w: torch.cat([w[:1] * 1.25, w[1:]]),
    "the sign": lambda w: -w,
    "another matrix": lambda w: w.roll(1, 0),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_projection_is_refused_by_its_name_with_the_way_out(
    change: str, tmp_path: Path
) -> None:
    name = f"{Q_PROJ}.base_layer.weight"
    tensors = {**lora(), name: CHANGES[change](own("llama", name)).contiguous()}
    (finding,) = examine(write(tmp_path, tensors), base_info("llama")).findings
    assert (finding.reason, finding.field) == ("ADAPTER_UNSUPPORTED", name)
    assert "A and B" in finding.message


def test_a_name_that_peft_would_not_load_is_left_out_only_if_it_equals_the_base(
    tmp_path: Path,
) -> None:
    base = base_info("llama")
    copy = own("llama", f"{HEAD}.weight")
    for name, others in (
        (f"{HEAD}.weight", on_head()),
        (f"{HEAD}.base_layer.weight", lora()),
        (f"{EMBED}.original_module.weight", lora()),
    ):
        same = copy if name.startswith(HEAD) else own("llama", f"{EMBED}.weight")
        assert at(examine(write(tmp_path, {**others, name: same}), base), "norm") is None
        (finding,) = examine(write(tmp_path, {**others, name: same + 0.1}), base).findings
        assert (finding.reason, finding.field) == ("ADAPTER_UNSUPPORTED", name)
        assert "PEFT does not load it" in finding.message
        assert "name it" in finding.message


def test_two_names_of_one_weight_must_have_the_same_values(tmp_path: Path) -> None:
    base = base_info("llama")
    saved, infix = f"{EMBED}.weight", f"{EMBED}.modules_to_save.weight"
    values = noise(tiny.VOCAB, 64)
    config = {"modules_to_save": ["embed_tokens"]}
    for other in (values, values.bfloat16().float(), values.half()):
        first = other if other.dtype == torch.float32 else values
        twins = {**lora(), saved: first, infix: other}
        embed = at(examine(write(tmp_path, twins, **config), base), "embed_tokens")
        assert embed is not None
        assert embed.tensors["weight"].name == saved
    twins = {**lora(), saved: values, infix: values.roll(1, 0)}
    (finding,) = examine(write(tmp_path, twins, **config), base).findings
    assert (finding.reason, finding.field) == ("ADAPTER_INVALID", infix)
    assert saved in finding.message
    magnitude = f"{Q_PROJ}.lora_magnitude_vector"
    both = {**lora(), magnitude: torch.ones(64), f"{magnitude}.weight": torch.zeros(64)}
    (finding,) = examine(write(tmp_path, both, use_dora=True), base).findings
    assert finding.field in (magnitude, f"{magnitude}.weight")


@pytest.mark.parametrize("ending", ["modules_to_save.weight", "modules_to_save.default.weight"])
def test_a_saved_weight_may_be_there_under_its_name_in_the_model_alone(
    gallery: Gallery, ending: str, tmp_path: Path
) -> None:
    values = noise(tiny.VOCAB, 64)
    config = {"modules_to_save": ["embed_tokens"]}
    deltas = []
    for name in ("weight", ending):
        folder = write(tmp_path / name, {**lora(), f"{EMBED}.{name}": values}, **config)
        digest = inspect(folder, base_info("llama")).digest
        deltas.append(load(folder, digest, gallery.weights("llama"))[1].sites[-1, "embed_tokens"])
    assert torch.equal(deltas[0].rows, deltas[1].rows)
    unlisted = write(tmp_path / "unlisted", {**lora(), f"{EMBED}.{ending}": values})
    (finding,) = examine(unlisted, base_info("llama")).findings
    assert "modules_to_save" in finding.message


@pytest.mark.parametrize(("rows", "said"), [(64, "64 more"), (-64, "64 fewer"), (1, "1 more")])
@pytest.mark.parametrize("saved", [True, False])
def test_another_vocabulary_is_named_with_its_size_and_the_way_out(
    saved: bool, rows: int, said: str, tmp_path: Path
) -> None:
    config = {"modules_to_save": ["embed_tokens", "lm_head"]} if saved else {}
    count = tiny.VOCAB + rows
    tensors = {**lora(), f"{EMBED}.weight": noise(count, 64), f"{HEAD}.weight": noise(count, 64)}
    (finding,) = examine_header(write(tmp_path, tensors, **config), base_info("llama")).findings
    assert finding.reason == "BASE_MODEL_MISMATCH"
    assert finding.field in tensors
    assert said in finding.message
    assert "resize" in finding.message or "pad" in finding.message
    tensors = lora(64, count, HEAD)
    (finding,) = examine(write(tmp_path, tensors), base_info("llama")).findings
    assert said in finding.message


def test_an_adapter_of_equal_copies_alone_changes_nothing(tmp_path: Path) -> None:
    tensors = {f"{HEAD}.weight": own("llama", f"{HEAD}.weight")}
    (finding,) = examine(write(tmp_path, tensors), base_info("llama")).findings
    assert (finding.reason, "changes nothing" in finding.message) == ("ADAPTER_INVALID", True)


def test_the_limit_of_the_device_counts_what_is_served(tmp_path: Path) -> None:
    base = base_info("llama")
    head = own("llama", f"{HEAD}.weight")
    limits = AdapterLimits(max_device_bytes=4096)
    name = f"{HEAD}.base_layer.weight"
    assert examine(write(tmp_path, {**on_head(), name: head}), base, limits).spec is not None
    source = write(tmp_path, {**on_head(), name: head + 1})
    (finding,) = examine(source, base, limits).findings
    assert finding.reason == "ADAPTER_TOO_LARGE"
    digest = inspect(source, base).digest
    with pytest.raises(Refusal) as refused:
        load(source, digest, Gallery(tmp_path).weights("llama"), limits)
    assert refused.value.reason == "ADAPTER_TOO_LARGE"


def test_without_the_base_s_file_copies_are_served_whole_or_refused(tmp_path: Path) -> None:
    name = f"{HEAD}.base_layer.weight"
    source = write(tmp_path, {**on_head(), name: own("llama", f"{HEAD}.weight")})
    for file in ("", str(tmp_path / "missing"), str(source / "adapter_config.json")):
        base = replace(base_info("llama"), weights_file=file)
        head = at(examine(source, base), "lm_head")
        assert head is not None
        assert (set(head.tensors), head.changed_rows) == ({"a", "b", "weight"}, ())
    name = f"{Q_PROJ}.base_layer.weight"
    source = write(tmp_path, {**lora(), name: own("llama", name)})
    (finding,) = examine(source, replace(base_info("llama"), weights_file="")).findings
    assert "cannot be compared" in finding.message


def test_norms_are_compared_too(tmp_path: Path) -> None:
    base, name = base_info("llama"), f"{NORM}.weight"
    weight = own("llama", name)
    assert at(examine(write(tmp_path, {**lora(), name: weight}), base), "norm") is None
    norm = at(examine(write(tmp_path, {**lora(), name: weight + 0.5}), base), "norm")
    assert norm is not None
    layer = f"{PREFIX}model.layers.1.post_attention_layernorm.weight"
    tensors = {**lora(), layer: own("llama", layer)}
    assert at(examine(write(tmp_path, tensors), base), "post_attention_layernorm") is None


def test_values_are_read_in_pieces_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files: the base's pieces are as long as the adapter's."""
    monkeypatch.setattr("loraplex_adapters.format.copies.comparing.PIECE", 4096)
    assert PIECE <= 4 << 20
    base = base_info("llama")
    copies = [f"{HEAD}.weight", f"{DOWN}.weight", f"{Q_PROJ}.base_layer.weight"]
    source = write(tmp_path, {**lora(), **{name: own("llama", name) for name in copies}})
    spec = examine_header(source, base).spec
    assert spec is not None
    file = (source / "adapter_model.safetensors").read_bytes()
    sizes: list[int] = []

    def read(start: int, length: int) -> bytes:
        sizes.append(length)
        return file[start : start + length]

    settled, findings = settle(spec, read, base, AdapterLimits())
    assert not findings
    assert {m.module for m in settled.modules} == {"q_proj"}
    assert max(sizes) <= 4096
    assert sum(sizes) == sum(c.tensor.end - c.tensor.start for c in spec.copies)
