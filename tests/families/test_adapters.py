"""Adapters of every kind on the families: PEFT's logits on the same NF4 base.

`adapter_kinds.pairs` is the covering set of families and kinds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import adapter_kinds
from families.adapter_bases import Bases, assert_equals, native, ours, theirs
from loraplex_adapters.convert.export.merged import write_dense
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.pack import pack
from transformers import AutoModelForCausalLM


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
