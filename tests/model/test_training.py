"""The decoder is differentiable in the adapters, through the NF4 base."""

from __future__ import annotations

import pytest
import torch
from loraplex_model.adapters.delta import LoraFactors, lora
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops.linear import DenseLinear
from model.conftest import Load
from model.passes import packed_logits, token_ids

from model import peft_oracle, tiny

STARTS = [0, 9, 16, 28]


@pytest.mark.parametrize("variant", ["llama", "qwen2-window"])
def test_gradients_equal_pefts(variant: str, load_tiny: Load, tmp_path) -> None:
    """Two adapters train in one pass over one base; PEFT trains them one after the other."""
    names = ["rank4", "rank8-rslora"]
    base = peft_oracle.quantised(tiny.write(variant, tmp_path / variant), torch.float32)
    peft = peft_oracle.with_adapters(base, {name: peft_oracle.ADAPTERS[name] for name in names})
    weights = load_tiny(variant).weights
    factors = []
    for name in names:
        modules = peft_oracle.factors_of(peft, name)
        factors.append(
            {
                key: LoraFactors(
                    m.a.clone().requires_grad_(), m.b.clone().requires_grad_(), m.scale
                )
                for key, m in modules.items()
            }
        )
    ids = torch.tensor(token_ids(0, STARTS[-1], tiny.VOCAB))
    groups = [
        RowGroup(torch.arange(0, 16), ((lora(factors[0]), 1.0),)),
        RowGroup(torch.arange(16, 28), ((lora(factors[1]), 1.0),)),
    ]
    logits = packed_logits(weights, ids, STARTS, groups)
    torch.nn.functional.cross_entropy(logits, ids.roll(-1), reduction="sum").backward()

    targets = ids.roll(-1)
    for adapter, sequences in ((0, (0, 1)), (1, (2,))):
        peft.set_adapter(names[adapter])
        peft.zero_grad()
        for s in sequences:
            span = slice(STARTS[s], STARTS[s + 1])
            out = peft(ids[None, span]).logits[0]
            torch.nn.functional.cross_entropy(out, targets[span], reduction="sum").backward()
        compared = 0
        for name, module in peft.named_modules():
            if hasattr(module, "lora_A") and names[adapter] in module.lora_A:
                parts = name.split(".")
                ours = factors[adapter][int(parts[parts.index("layers") + 1]), parts[-1]]
                theirs = module.lora_A[names[adapter]].weight, module.lora_B[names[adapter]].weight
                for mine, wanted in zip((ours.a, ours.b), theirs, strict=True):
                    assert mine.grad is not None
                    assert wanted.grad is not None
                    assert wanted.grad.abs().max() > 1e-4
                    torch.testing.assert_close(mine.grad, wanted.grad, atol=1e-4, rtol=1e-4)
                    compared += 1
        assert compared == 2 * len(factors[adapter])


def test_unpacking_anew_and_keeping_give_the_same_logits(load_tiny: Load) -> None:
    weights = load_tiny("llama").weights
    batch = ForwardBatch.build([(token_ids(1, 20, tiny.VOCAB), 0, [0, 1], ())])
    one, other = (
        ReferenceDecoder(weights, 2, 16, 1, keep_dense=keep).forward(batch)
        for keep in (False, True)
    )
    assert torch.equal(one, other)


def test_unpacking_anew_and_keeping_give_the_same_gradients(load_tiny: Load) -> None:
    weights = load_tiny("qwen3").weights
    ids = torch.tensor(token_ids(1, 12, tiny.VOCAB))
    gradients = []
    for linear in (None, DenseLinear()):
        a = torch.full((4, 64), 0.1, requires_grad=True)
        b = torch.full((128, 4), 0.1, requires_grad=True)
        group = RowGroup(torch.arange(12), ((lora({(0, "q_proj"): LoraFactors(a, b, 1.0)}), 1.0),))
        packed_logits(weights, ids, [0, 12], [group], linear).square().mean().backward()
        gradients.append((a.grad, b.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
