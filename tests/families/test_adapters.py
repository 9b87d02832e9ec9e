"""Adapters of every kind on the families: PEFT's logits on the same NF4 base.

`adapter_kinds.pairs` is the covering set of families and kinds.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import adapter_kinds
from families.adapter_bases import Bases, assert_equals, native, ours, theirs
from loraplex_adapters.convert.export.merged import write_dense
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.pack import pack
from safetensors.torch import load_file
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


def test_every_kind_meets_every_feature_and_every_variant_some_kind() -> None:
    pairs = adapter_kinds.pairs()
    assert {variant for variant, _ in pairs} == adapter_kinds.served()
    for kind in adapter_kinds.KINDS:
        met = {f for v, k in pairs if k == kind for f in adapter_kinds.features_of(v)}
        assert adapter_kinds.concerning(kind) <= met, kind
    found = adapter_kinds.concerning("norms")
    assert {"joined ('qkv', 'gate_up')", "norm layer", "norm_bias", "gated", "parallel"} <= found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "kind"), adapter_kinds.pairs())
def test_an_adapter_equals_peft(bases: Bases, variant: str, kind: str, tmp_path: Path) -> None:
    base, model = bases.ours(variant), bases.theirs(variant)
    peft_model = adapter_kinds.adapted(kind, base.weights.info, model, tmp_path / "adapter")
    spec = inspect(tmp_path / "adapter", base.weights.info)
    spec, delta = load(tmp_path / "adapter", spec.digest, base.weights)
    expected = theirs(peft_model)
    assert (expected - theirs(model)).abs().max() > 3e-2, "parity would prove nothing"
    assert_equals(ours(base, delta), expected)
    assert_equals(native(base, delta), expected)
    assert pack(delta, torch.float32).nbytes == spec.packed_bytes
    if kind in adapter_kinds.MERGED:
        assert_equals(native(base, delta, merged=True), expected)
    if kind in adapter_kinds.EXPORTED:
        write_dense(tmp_path / "merged", base, delta, torch.float32, stamps={})
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert_equals(theirs(merged.eval()), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_bottleneck_reads_the_stream_with_the_scaled_output(bases: Bases, tmp_path: Path) -> None:
    base, model = bases.ours("granite"), copy.deepcopy(bases.theirs("granite"))
    folder = tmp_path / "adapter"
    adapter_kinds.adapted("bottleneck", base.weights.info, model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "reads": "stream"}))
    tensors = load_file(folder / "adapter_model.safetensors")
    for i, layer in enumerate(model.model.layers):
        for block, norm in (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            prefix = f"base_model.model.model.layers.{i}.{block}.bottleneck_"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            _add_after_stream(getattr(layer, norm), getattr(layer, block), own, model.config)
    spec = inspect(folder, base.weights.info)
    _, delta = load(folder, spec.digest, base.weights)
    expected = theirs(model)
    assert_equals(ours(base, delta), expected)
    assert_equals(native(base, delta), expected)


def _add_after_stream(
    norm: torch.nn.Module, block: torch.nn.Module, own: dict[str, torch.Tensor], config: Any
) -> None:
    """Adds a bottleneck to a block's output; the input of `norm` is the stream before it."""
    seen: list[torch.Tensor] = []

    def add(_: Any, inputs: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        stream = seen.pop() + config.residual_multiplier * out
        inner = silu(linear(stream, own["down.weight"], own["down.bias"]))
        out = out + 0.8 * linear(inner, own["up.weight"], own["up.bias"])
        return (out, *output[1:]) if isinstance(output, tuple) else out

    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block.register_forward_hook(add)
