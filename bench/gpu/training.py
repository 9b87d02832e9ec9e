"""S7: a QLoRA step on this device, compared with the same step on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import torch
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.decoder import forward
from loraplex_model.decoder.attention import PackedAttention
from loraplex_model.ops import known_faults
from loraplex_model.ops.linear import BaseLinear, DequantisedLinear, FusedLinear

from gpu import oracles, references
from gpu.stage import StageReport

RANK = 4
FLOAT32, BFLOAT16 = 2e-3, 8e-2
"""Largest relative errors of gradients, by compute type."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A training step's loss before and after, its gradients and the parameters after it."""

    before: float
    after: float
    gradients: torch.Tensor
    parameters: torch.Tensor


def run(report: StageReport) -> None:
    """Compares losses, gradients and parameters; runs the 8-bit optimisers where they exist."""
    known_faults.avoid(report.device)
    variant = references.VARIANTS[0]
    wanted = step(variant, "cpu", torch.float32)
    report.check(wanted.after < wanted.before, "a step on the CPU did not lower the loss")
    cases = ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16))
    for dtype, most in cases[:1] if report.dry else cases:
        found = step(variant, report.device, dtype)
        name = str(dtype).removeprefix("torch.")
        report.check(found.after < found.before, f"{name}: a step did not lower the loss")
        difference = abs(found.before - wanted.before) / wanted.before
        report.check(difference < most, f"{name}: the loss differs by {difference:.2e}")
        error = oracles.relative(found.gradients, wanted.gradients)
        report.check(error < most, f"{name}: gradients differ by {error:.2e}, allowed {most:.0e}")
        report.figure(f"gradient_error_{name}", error)
    if report.dry:
        return
    if find_spec("bitsandbytes") is None:
        report.note("bitsandbytes is not installed: no 4-bit products and 8-bit optimisers")
        return
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        found = step(variant, report.device, torch.bfloat16, name)
        report.check(found.after < found.before, f"{name}: a step did not lower the loss")


def step(variant: str, device: str, dtype: torch.dtype, optimiser: str = "AdamW") -> Stepped:
    """One step over the prompts of a tiny model, each packed behind the other."""
    model = references.load(variant, device, dtype)
    weights, config = model.weights, model.weights.config
    generator = torch.Generator().manual_seed(0)
    sites, parameters = {}, []
    for layer in range(config.num_layers):
        for name in PROJECTIONS:
            fan_in, out = config.projection_shapes()[name]
            factors = []
            for width, std in ((fan_in, fan_in**-0.5), (out, 0.05)):
                values = torch.randn(RANK, width, generator=generator) * std
                factors.append(values.to(device).requires_grad_())
            parameters += factors
            sites[layer, name] = ProjectionDelta(a=factors[0], b=factors[1])
    delta = AdapterDelta(sites, None)
    tokens = torch.tensor([token for prompt in model.prompts for token in prompt], device=device)
    starts = [0]
    for prompt in model.prompts:
        starts.append(starts[-1] + len(prompt))
    learned = torch.ones(len(tokens), dtype=torch.bool, device=device)
    learned[torch.tensor(starts[1:], device=device) - 1] = False  # nothing follows a last token
    linear: BaseLinear = DequantisedLinear()
    if device == "cuda" and find_spec("bitsandbytes") is not None:
        linear = FusedLinear()
    kind = torch.optim.AdamW
    if optimiser != "AdamW":
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, optimiser)
    updates = kind(parameters, lr=1e-3)

    def loss() -> torch.Tensor:
        lengths = [end - start for start, end in pairwise(starts)]
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        rows = torch.arange(len(tokens), device=device)
        groups = [RowGroup(rows, ((delta, 1.0),), span=slice(0, len(tokens)))]
        hidden = forward.hidden_states(
            weights, tokens, positions, groups, linear, PackedAttention(config, starts)
        )
        logits = forward.logits(weights, hidden, groups).float()
        targets = tokens.roll(-1)
        return torch.nn.functional.cross_entropy(logits[learned], targets[learned])

    first = loss()
    first.backward()
    gradients = torch.cat([p.grad.flatten().cpu() for p in parameters if p.grad is not None])
    updates.step()
    with torch.no_grad():
        second = loss()
    flat = torch.cat([parameter.detach().flatten().cpu() for parameter in parameters])
    return Stepped(first.item(), second.item(), gradients, flat)
