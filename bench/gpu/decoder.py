"""S4: the whole decoder compared with float64, with itself in other batches, and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.cuda.decoder import CudaDecoder
from loraplex_model.decoder.cuda.graphs import GraphSizes

from gpu import inputs, oracles, references
from gpu.stage import StageReport

BLOCK = 32
BFLOAT16, FLOAT32 = 4e-2, 1e-4
"""Largest relative errors of logits, by compute type. The models are tiny and their weights large,
so bfloat16 costs more than in a real model."""

AGREE = 0.9
"""Share of positions where bfloat16 has the largest logit where float64 has it."""


class Session:
    """A decoder with sequences of its own KV blocks, full of NaN until they are written."""

    def __init__(
        self,
        weights: BaseWeights,
        sequences: int,
        length: int,
        *,
        slots: int = 1,
        graphs: GraphSizes | None = None,
    ) -> None:
        self.per = -(-length // BLOCK)
        blocks = sequences * self.per
        # Without a device a graph is the function that would be captured.
        capture = None if weights.embed.is_cuda else repeated
        self.decoder = CudaDecoder(
            weights,
            blocks,
            BLOCK,
            slots,
            max_positions=length,
            graphs=graphs,
            capture=capture,
        )
        self.order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        for cache in (*self.decoder.keys, *self.decoder.values):
            cache.fill_(float("nan"))

    def blocks(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in a shuffled order."""
        return [self.order[sequence * self.per + i] for i in range(self.per)]

    def step(self, parts: Sequence[tuple[int, list[int], int, Mix]], every: bool) -> torch.Tensor:
        """A pass of (sequence, new tokens, position of the first, mix): all logits, or the last."""
        rows = [(ids, first, self.blocks(s), mix) for s, ids, first, mix in parts]
        total = sum(len(ids) for _, ids, _, _ in parts)
        batch = ForwardBatch.build(rows, list(range(total)) if every else None)
        return self.decoder.forward(batch)


def repeated(body: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a capture: replaying launches everything again."""
    body()
    return body


def run(report: StageReport) -> None:
    """All parts, the ones that compare with an independent computation first."""
    torch.manual_seed(0)
    for part in (families, adapters, graphs_and_kernels, alone_and_among_others):
        before, checks = len(report.failed), report.checks
        part(report)
        bad = len(report.failed) - before
        name = part.__name__.replace("_", " ")
        print(f"    {name}: {report.checks - checks} checks, {bad} failed", flush=True)


def families(report: StageReport) -> None:
    """Tiny models of the families against Hugging Face: prompts in chunks, then single tokens."""
    variants = references.VARIANTS[-1:] if report.dry else references.VARIANTS
    for variant in variants:
        for dtype, most in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
            if report.dry and dtype == torch.bfloat16:
                continue
            model = references.load(variant, report.device, dtype)
            session = Session(model.weights, len(model.prompts), 64)
            found: list[list[torch.Tensor]] = [[] for _ in model.prompts]
            done = [0] * len(model.prompts)
            # All but the last two tokens in chunks of different lengths, then one by one.
            chunks = [3, 20, 64, 1, 1]
            for chunk in chunks:
                parts: list[tuple[int, list[int], int, Mix]] = []
                for s, prompt in enumerate(model.prompts):
                    limit = len(prompt) - (0 if chunk == 1 else 2)
                    ids = prompt[done[s] : min(done[s] + chunk, limit)]
                    if ids:
                        parts.append((s, ids, done[s], ()))
                logits = session.step(parts, every=True)
                for (s, ids, _, _), part in zip(
                    parts, logits.split([len(ids) for _, ids, _, _ in parts]), strict=True
                ):
                    found[s].append(part)
                    done[s] += len(ids)
            result = torch.cat([torch.cat(own) for own in found])
            wanted = torch.cat(list(model.logits))
            name = f"{variant}, {str(dtype).removeprefix('torch.')}"
            error = oracles.relative(result, wanted)
            report.check(error < most, f"{name}: relative error {error:.2e}, allowed {most:.0e}")
            agree = (result.argmax(1) == wanted.argmax(1)).double().mean().item()
            least = AGREE if dtype == torch.bfloat16 else 0.99
            report.check(agree >= least, f"{name}: {agree:.3f} of the largest logits agree")


def adapters(report: StageReport) -> None:
    """Adapters that come and go between replays of graphs that were captured without any.

    Graphs have room for one more row than there are, so each replay has a row of padding.
    """
    device = report.device
    model = inputs.TINY if report.dry else inputs.with_layers(inputs.LLAMA_8B, 2)
    count = 3 if report.dry else 64
    # The interpreter drops bits where a device rounds to the nearest bfloat16.
    dtype = torch.float32 if report.dry else torch.bfloat16
    weights = inputs.random_weights(model, dtype, device)
    sizes = GraphSizes(max_rank=8, rows=(count + 1,))
    session = Session(weights, count, BLOCK, slots=count, graphs=sizes)
    table = session.decoder.table
    template = inputs.adapter_of(model, 8, dtype)
    copies = [inputs.random_factors(template, device, 0.05) for _ in range(4)]

    def decode(mixes: Sequence[Mix]) -> torch.Tensor:
        rows = [(s, [5 + s], 0, mix) for s, mix in enumerate(mixes)]
        return session.step(rows, every=False)

    bare: Sequence[Mix] = [()] * count
    base = decode(bare)
    report.check(bool(base.isfinite().all()), "the base's logits are not finite")
    table.publish(0, copies[0])
    one = decode([((0, 1.0),), *bare[1:]])
    report.check(torch.equal(one[1:], base[1:]), "an adapter changed rows of the base")
    report.check(not torch.equal(one[0], base[0]), "an adapter changed nothing")
    for slot in range(1, count):
        table.publish(slot, copies[slot % len(copies)])
    every = decode([((slot, 1.0),) for slot in range(count)])
    report.check(torch.equal(every[0], one[0]), "a row depends on the adapters of other rows")
    changed = [not torch.equal(every[s], base[s]) for s in range(count)]
    report.check(all(changed), f"{changed.count(False)} of {count} adapters were skipped")
    mixed = decode([((0, 0.5), (1, 0.5)), *(((slot, 1.0),) for slot in range(1, count))])
    report.check(not torch.equal(mixed[0], every[0]), "a mix equals its first adapter")
    # A merged row is not computed in graphs, and single launches have no row of padding: with
    # another number of rows another product may be the fastest, whose last bits differ.
    graphs, session.decoder.graphs = session.decoder.graphs, None
    report.check(graphs is not None, "no graphs were captured")
    single = decode([((slot, 1.0),) for slot in range(count)])
    table.publish_merge(0, session.decoder.merge(copies[0], dtype))
    merged = decode([((slot, 1.0),) for slot in range(count)])
    session.decoder.graphs = graphs
    error = oracles.relative(merged[0], every[0])
    report.check(error < BFLOAT16, f"merged rows differ by {error:.2e} from unmerged ones")
    report.check(torch.equal(merged[1:], single[1:]), "a merge changed rows of other adapters")
    for slot in range(count):
        table.remove(slot)
    report.check(torch.equal(decode(bare), base), "removed adapters left something behind")


def graphs_and_kernels(report: StageReport) -> None:
    """A graph gives what its kernels give, launched one by one, for base rows and adapters."""
    model = inputs.TINY if report.dry else inputs.with_layers(inputs.LLAMA_8B, 2)
    count, length = (2, 40) if report.dry else (64, 600)
    dtype = torch.float32 if report.dry else torch.bfloat16
    weights = inputs.random_weights(model, dtype, report.device)
    adapter = inputs.random_factors(inputs.adapter_of(model, 8, dtype), report.device, 0.05)
    results = []
    for sizes in (None, GraphSizes(max_rank=8, rows=(count,))):
        session = Session(weights, count, length, slots=count, graphs=sizes)
        has_graphs = session.decoder.graphs is not None
        report.check(has_graphs == (sizes is not None), "no graphs were captured")
        for slot in range(count):
            session.decoder.table.publish(slot, adapter)
        first = 1 if report.dry else 512
        prompts = [(s, list(range(s % 50 + 3, s % 50 + 3 + first)), 0, ()) for s in range(2)]
        session.step(prompts, every=False)
        rows: list[tuple[int, list[int], int, Mix]] = [(s, [9 + s], first, ()) for s in range(2)]
        rows += [(s, [9 + s], 0, ((s, 1.0),)) for s in range(2, count)]
        results.append(torch.cat([session.step(rows, every=False) for _ in range(2)]))
    report.check(bool(results[0].isfinite().all()), "logits are not finite")
    report.check(torch.equal(*results), "graphs and single launches differ")


def alone_and_among_others(report: StageReport) -> None:
    """With one row bucket, a row's bits do not depend on the other rows."""
    device = report.device
    model = inputs.TINY if report.dry else inputs.with_layers(inputs.LLAMA_8B, 2)
    count = 3 if report.dry else 64
    weights = inputs.random_weights(model, torch.bfloat16, device)
    session = Session(weights, count, BLOCK)
    parts: list[tuple[int, list[int], int, Mix]] = [(s, [7 + s], 0, ()) for s in range(count)]
    first = session.step(parts, every=False)
    again = session.step(parts, every=False)
    report.check(torch.equal(first, again), "the same pass twice gave different bits")
    other = [parts[0], *((s, [100 + s], 0, ()) for s in range(1, count))]
    among = session.step(other, every=False)
    report.check(torch.equal(among[0], first[0]), "a row depends on the tokens of other rows")
