"""Random adapters that between them change everything an adapter can change."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from loraplex_model.adapters.delta import (
    Activation,
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    Reads,
    RowsDelta,
    SiteDelta,
    VirtualTokens,
)
from loraplex_model.base.config import MODEL, DecoderConfig, Site

KINDS = (
    "lora",
    "gains",
    "biases",
    "input-gains",
    "norms",
    "bottlenecks",
    "embedding",
    "token-rows",
    "head",
    "whole-head",
    "everything",
)


def random_adapter(kind: str, config: DecoderConfig, seed: int) -> AdapterDelta:
    """An adapter of one kind, or of all at once, with changes too large to be overlooked."""
    maker = _Maker(config, seed)
    kinds = [k for k in KINDS if k not in ("everything", "whole-head")]
    sites: dict[Site, SiteDelta] = {}
    for name in kinds if kind == "everything" else [kind]:
        for site, change in getattr(maker, name.replace("-", "_"))().items():
            given = {f.name: getattr(change, f.name) for f in fields(change)}
            present = {name: value for name, value in given.items() if value is not None}
            sites[site] = replace(sites.get(site, change), **present)
    return AdapterDelta(sites)


def random_prompt(config: DecoderConfig, count: int, seed: int) -> AdapterDelta:
    """Virtual tokens by their embeddings."""
    embeddings = _Maker(config, seed).normal(count, config.hidden_size)
    return AdapterDelta({}, VirtualTokens(embeddings=embeddings))


class _Maker:
    def __init__(self, config: DecoderConfig, seed: int) -> None:
        self.config = config
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 0.1) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=self.random)

    def near_one(self, width: int) -> torch.Tensor:
        return 1 + self.normal(width, scale=0.3)

    def projections(self) -> list[tuple[Site, int, int]]:
        shapes = self.config.projection_shapes()
        experts = {*self.config.fused["gate_up"], "down_proj"} if self.config.num_experts else ()
        return [
            ((layer, name), fan_in, out)
            for layer in range(self.config.num_layers)
            for name, (fan_in, out) in shapes.items()
            if name not in experts and torch.rand((), generator=self.random) < 0.8
        ]

    def lora(self) -> dict[Site, SiteDelta]:
        found = {}
        for site, fan_in, out in self.projections():
            rank = int(torch.randint(1, 9, (), generator=self.random))
            found[site] = ProjectionDelta(a=self.normal(rank, fan_in), b=self.normal(rank, out))
        return found

    def gains(self) -> dict[Site, SiteDelta]:
        return {
            site: ProjectionDelta(gain=self.near_one(out)) for site, _, out in self.projections()
        }

    def biases(self) -> dict[Site, SiteDelta]:
        return {site: ProjectionDelta(bias=self.normal(out)) for site, _, out in self.projections()}

    def input_gains(self) -> dict[Site, SiteDelta]:
        return {
            site: ProjectionDelta(in_gain=self.near_one(fan_in))
            for site, fan_in, _ in self.projections()
        }

    def norms(self) -> dict[Site, SiteDelta]:
        found: dict[Site, SiteDelta] = {(MODEL, "norm"): self.norm("norm", self.hidden)}
        for layer in range(self.config.num_layers):
            for name, width in self.config.norm_widths().items():
                found[layer, name] = self.norm(name, width)
        return found

    def norm(self, name: str, width: int) -> NormDelta:
        of_stream = name in ("norm", "input_layernorm", "post_attention_layernorm")
        has_bias = self.config.norm_bias and of_stream
        return NormDelta(self.normal(width), self.normal(width, scale=0.5) if has_bias else None)

    def bottlenecks(self) -> dict[Site, SiteDelta]:
        found: dict[Site, SiteDelta] = {}
        choices = [(f, r) for f in Activation for r in Reads]
        for layer in range(self.config.num_layers):
            for i, name in enumerate(("attention_bottleneck", "mlp_bottleneck")):
                activation, reads = choices[(layer * 7 + i * 5) % len(choices)]
                found[layer, name] = BottleneckDelta(
                    down=self.normal(6, self.hidden, scale=0.3),
                    up=self.normal(6, self.hidden),
                    down_bias=self.normal(6) if layer else None,
                    up_bias=self.normal(self.hidden) if layer else None,
                    activation=activation,
                    reads=reads,
                )
        return found

    def embedding(self) -> dict[Site, SiteDelta]:
        a, b = self.normal(self.config.vocab_size, 5), self.normal(5, self.hidden)
        return {(MODEL, "embed_tokens"): RowsDelta(a=a, b=b)}

    def token_rows(self) -> dict[Site, SiteDelta]:
        ids = torch.tensor([3, 17, 18, 90], dtype=torch.int32)
        rows = RowsDelta(token_ids=ids, rows=self.normal(4, self.hidden))
        return {(MODEL, "embed_tokens"): rows, (MODEL, "lm_head"): rows}

    def head(self) -> dict[Site, SiteDelta]:
        a, b = self.normal(5, self.hidden), self.normal(5, self.config.vocab_size)
        return {(MODEL, "lm_head"): RowsDelta(a=a, b=b)}

    def whole_head(self) -> dict[Site, SiteDelta]:
        vocab = self.config.vocab_size
        ids, rows = torch.arange(vocab, dtype=torch.int32), self.normal(vocab, self.hidden)
        return {(MODEL, "lm_head"): RowsDelta(token_ids=ids, rows=rows)}

    @property
    def hidden(self) -> int:
        return self.config.hidden_size
