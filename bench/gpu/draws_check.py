"""Tokens chosen on the device, compared with those that the server's sampler chooses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from loraplex_model.decoder.cuda.draws import DrawTable
from loraplex_model.decoder.cuda.kernels import sampling
from loraplex_server.engine.batching.sampler import Draw, sample
from loraplex_server.engine.messages import SamplingParams
from loraplex_server.engine.runner.protocol import DrawOrder

from gpu.stage import StageReport

SHARE = 0.999
"""Random draws that must agree: a draw within rounding of a boundary may take its neighbour."""


@dataclass(frozen=True, slots=True)
class Case:
    """Parameters of a draw, by the names of `SamplingParams`."""

    name: str
    values: dict[str, float]


CASES = (
    Case("greedy", {"temperature": 0.0}),
    Case("temperature", {"temperature": 0.8}),
    Case("top-k", {"top_k": 40}),
    Case("top-p", {"top_p": 0.9}),
    Case("min-p", {"min_p": 0.05, "temperature": 1.3}),
    Case("penalties", {"repetition_penalty": 1.2, "presence_penalty": 0.5}),
    Case("everything", {"top_k": 60, "top_p": 0.95, "min_p": 0.01, "frequency_penalty": 0.3}),
)


def draws(report: StageReport) -> None:
    """Every sort of draw, each for many seeds, and rows that are not finite."""
    device = report.device
    vocab, seeds = (300, 2) if report.dry else (128_256, 64)
    generator = torch.Generator().manual_seed(0)
    for case in CASES:
        logits = torch.randn(seeds, vocab, generator=generator) * 4
        if case.name == "greedy":
            logits[-1, vocab // 2] = float("nan")
        own = [
            Draw(SamplingParams(**case.values, seed=seed), prompt=[3, 7])  # type: ignore[arg-type]
            for seed in range(seeds)
        ]
        for draw in own:
            draw.saw(5)
        orders = [order_of(draw) for draw in own]
        wanted = sample(logits.numpy().copy(), own)
        found = chosen(logits.to(device), orders, device)
        agree = sum(a == b for a, b in zip(found, wanted, strict=True)) / seeds
        least = 1.0 if case.name == "greedy" else min(SHARE, 1 - 1.5 / seeds)
        report.check(agree >= least, f"draws, {case.name}: {agree:.4f} agree with the host's")


def order_of(draw: Draw) -> DrawOrder:
    """The draw as the device takes it."""
    params = draw.params
    counted, counts = draw.counted
    return DrawOrder(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        uniform=draw.uniform(),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seen=draw.seen,
        counted=counted,
        counts=counts,
    )


def chosen(logits: torch.Tensor, orders: list[DrawOrder], device: str) -> list[int]:
    """Tokens that the device chooses, one for each row."""
    count = len(orders)
    table = DrawTable.of(orders, np.arange(count, dtype=np.int32))
    on_device = sampling.DeviceDraws(
        torch.from_numpy(table.records).to(device),
        torch.from_numpy(table.lists).to(device),
        torch.tensor([count], dtype=torch.int32, device=device),
    )
    tokens = torch.full((count,), -7, dtype=torch.int32, device=device)
    kept = sampling.workspace(count, torch.device(device))
    sampling.sample(logits.contiguous(), on_device, tokens, kept)
    return tokens.tolist()
