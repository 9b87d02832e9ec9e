"""AdapterHub's bottlenecks: converted if the sums are the same, refused if they are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters.adapter_files import BASE, weights_bytes
from loraplex_adapters.convert.importers.adapterhub import convert
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import CheckedAdapter
from loraplex_model.base.refusal import Refusal
from safetensors.torch import load_file, save_file

HIDDEN = BASE.config.hidden_size
BN: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.1,
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": 4,
    "residual_before_ln": True,
    "scaling": 1.0,
    "use_gating": False,
}
PFEIFFER = {**BN, "non_linearity": "relu"}
HOULSBY = {**BN, "original_ln_before": False, "mh_adapter": True, "non_linearity": "swish"}

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "leakyrelu": torch.nn.functional.leaky_relu,
    "tanh": torch.tanh,
}
OURS = {**ACTIVATIONS, "silu": ACTIVATIONS["swish"], "gelu_tanh": ACTIVATIONS["gelu_new"]}
OURS["leaky_relu"] = ACTIVATIONS["leakyrelu"]


def theirs(config: dict[str, Any], layers: int = 2, prefix: str = "model.") -> dict[str, Any]:
    """Random tensors with the library's names."""
    places = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
    width = HIDDEN // config["reduction_factor"]
    shapes = {
        "adapter_down.0.weight": (width, HIDDEN),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (HIDDEN, width),
        "adapter_up.bias": (HIDDEN,),
    }
    return {
        f"{prefix}layers.{layer}.{place}.adapters.task.{name}": torch.randn(shape)
        for layer in range(layers)
        if layer not in config["leave_out"]
        for flag, place in places.items()
        if config[flag]
        for name, shape in shapes.items()
    }


def write(
    directory: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None, **outer: Any
) -> Path:
    directory.mkdir()
    about = {"model_type": "llama", "version": "adapters.1.3.0", "hidden_size": HIDDEN, **outer}
    text = json.dumps({**about, "config": config})
    (directory / "adapter_config.json").write_text(text)
    save_file(tensors or theirs(config), directory / "adapter.safetensors")
    return directory


def converted(directory: Path, config: dict[str, Any], **outer: Any) -> CheckedAdapter:
    convert(write(directory / "theirs", config, **outer), directory / "ours")
    return inspect(directory / "ours", BASE)


def their_sum(
    config: dict[str, Any], tensors: dict[str, Any], h: torch.Tensor, r: torch.Tensor
) -> torch.Tensor:
    """Output of a decoder block without a norm after it, computed in the library's steps."""
    if config["is_parallel"]:
        residual, x = h, r
        down = torch.nn.functional.linear(x, tensors["down.0.weight"], tensors["down.0.bias"])
        inner = ACTIVATIONS[config["non_linearity"]](down)
        up = torch.nn.functional.linear(inner, tensors["up.weight"], tensors["up.bias"])
        return up * config["scaling"] + residual + r
    residual = h if config["residual_before_ln"] is True else None
    x = h + r if config["original_ln_before"] else h
    if residual is None:
        residual = x
    down = torch.nn.functional.linear(x, tensors["down.0.weight"], tensors["down.0.bias"])
    inner = ACTIVATIONS[config["non_linearity"]](down)
    up = torch.nn.functional.linear(inner, tensors["up.weight"], tensors["up.bias"])
    out = up * config["scaling"] + residual
    return out + r if config["original_ln_after"] else out


def our_sum(
    spec: CheckedAdapter, site: tuple[int, str], ours: Path, h: torch.Tensor, r: torch.Tensor
) -> torch.Tensor:
    """The residual stream after a block, by the format's description."""
    module = next(m for m in spec.modules if (m.layer, m.module) == site)
    held = load_file(ours / "adapter_model.safetensors")
    tensors = {role: held[location.name] for role, location in module.tensors.items()}
    stream = h + r
    x = {"output": h, "stream": stream, "incoming": r}[module.reads]
    inner = OURS[module.activation](x @ tensors["down"].T + tensors["down_bias"])
    return stream + module.scale * (inner @ tensors["up"].T + tensors["up_bias"])


EXACT = {
    "seq_bn": PFEIFFER,
    "double_seq_bn": HOULSBY,
    "par_bn": {**PFEIFFER, "is_parallel": True, "scaling": 4.0},
    "scaled": {**PFEIFFER, "scaling": 4.0, "non_linearity": "gelu"},
    "leaving out": {**HOULSBY, "leave_out": [0], "non_linearity": "leakyrelu"},
    "its own residual": {
        **PFEIFFER,
        "residual_before_ln": False,
        "original_ln_after": False,
        "non_linearity": "gelu_new",
    },
    "attention alone": {
        **HOULSBY,
        "output_adapter": False,
        "original_ln_before": True,
        "non_linearity": "tanh",
    },
}


@pytest.mark.parametrize("name", EXACT)
def test_the_residual_stream_is_the_librarys(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = EXACT[name]
    spec = converted(tmp_path, config)
    source = load_file(tmp_path / "theirs/adapter.safetensors")
    assert len(source) == sum(len(m.tensors) for m in spec.modules)
    h, r = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    places = {"attention_bottleneck": "attention_adapters", "mlp_bottleneck": "output_adapters"}
    for module in spec.modules:
        prefix = f"model.layers.{module.layer}.{places[module.module]}.adapters.task.adapter_"
        tensors = {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
        expected = their_sum(config, tensors, h, r)
        actual = our_sum(spec, (module.layer, module.module), tmp_path / "ours", h, r)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"is_parallel": True, "original_ln_after": False}, "original_ln_after"),
    ({"use_gating": True}, "use_gating"),
    ({"phm_layer": True}, "phm_layer"),
    ({"inv_adapter": "nice"}, "inv_adapter"),
    ({"ln_before": True}, "ln_before"),
    ({"ln_after": True}, "ln_after"),
    ({"cross_adapter": True}, "cross_adapter"),
    ({"scaling": "learned"}, "scaling"),
    ({"scaling": "channel"}, "scaling"),
    ({"non_linearity": "mish"}, "non_linearity"),
    ({"original_ln_after": False}, "original_ln_after"),  # drops the stream
    ({"residual_before_ln": False}, "original_ln_after"),  # adds it twice
    ({"residual_before_ln": "post_add"}, "residual_before_ln"),
    ({"architecture": "union"}, "architecture"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED)
def test_what_would_not_be_exact_is_refused_by_its_name(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as refused:
        converted(tmp_path, {**PFEIFFER, **changes})
    assert [(f.reason, f.field) for f in refused.value.problems] == [("ADAPTER_UNSUPPORTED", field)]
    assert not (tmp_path / "ours").exists()


def test_a_layer_norm_among_the_tensors_is_refused(tmp_path: Path) -> None:
    tensors = theirs(PFEIFFER)
    place = "model.layers.0.output_adapters.adapters.task"
    tensors[f"{place}.adapter_norm_before.weight"] = torch.ones(HIDDEN)
    source = write(tmp_path / "theirs", PFEIFFER, tensors)
    with pytest.raises(Refusal, match="adapter_norm_before"):
        convert(source, tmp_path / "ours")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_layer_that_is_missing_is_not_left_out_by_itself(lost: int, tmp_path: Path) -> None:
    tensors = {k: v for k, v in theirs(HOULSBY).items() if f"s.{lost}.attention" not in k}
    source = write(tmp_path / "theirs", HOULSBY, tensors)
    with pytest.raises(Refusal, match="has no weights"):
        convert(source, tmp_path / "ours")


def test_other_models_heads_and_pickles_are_refused(tmp_path: Path) -> None:
    for number, (name, outer) in enumerate(
        [("", {"model_type": "bert"}), ("head_config.json", {}), ("pytorch_adapter.bin", {})]
    ):
        source = write(tmp_path / f"theirs{number}", PFEIFFER, **outer)
        if name:
            (source / name).write_bytes(b"\x80\x04")
        with pytest.raises(Refusal) as refused:
            convert(source, tmp_path / "ours")
        assert refused.value.reason == "ADAPTER_UNSUPPORTED"
        assert refused.value.field == (name or "model_type")


def test_a_broken_weights_file_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "theirs", PFEIFFER)
    (source / "adapter.safetensors").write_bytes(
        weights_bytes({"x": np.zeros((1, 1), np.float32)})[:-1]
    )
    with pytest.raises(Refusal) as refused:
        convert(source, tmp_path / "ours")
    assert refused.value.reason == "ADAPTER_INVALID"
    assert refused.value.field == "adapter.safetensors"


def test_names_without_the_models_prefix_are_known_too(tmp_path: Path) -> None:
    bare = theirs(PFEIFFER, prefix="")
    convert(write(tmp_path / "theirs", PFEIFFER, bare), tmp_path / "ours")
    assert inspect(tmp_path / "ours", BASE).rank == HIDDEN // 4


def test_old_files_mean_another_gelu(tmp_path: Path) -> None:
    source = write(tmp_path / "theirs", {**PFEIFFER, "non_linearity": "gelu"})
    config = json.loads((source / "adapter_config.json").read_text())
    del config["version"]
    (source / "adapter_config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "ours")
    spec = inspect(tmp_path / "ours", BASE)
    assert {m.activation for m in spec.modules} == {"gelu_tanh"}
    assert spec.provenance["imported_from"] == "adapterhub"
