"""S5: tokens per second of the whole engine over a synthetic 8B model, in this process.

The engine, its scheduler, its sampling and its adapter slots are those of the server; only the
front process, gRPC and files are left out. Weights and adapters are random, which costs the same
as trained ones. The rates are those of steps in which every request decodes.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.mapped import MappedFile
from loraplex_model.decoder.cuda.decoder import CudaDecoder
from loraplex_model.decoder.open import Decoder, ServingSizes, open_decoder
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    AdapterRef,
    Load,
    ModelInfo,
    SamplingParams,
    StepReport,
    Submit,
    Unload,
)
from loraplex_server.engine.runner.adapter_memory import adapter_memory
from loraplex_server.engine.runner.local import LocalRunner, ReadAdapter

from gpu import inputs
from gpu.stage import StageReport
from gpu.timing import synchronise

DTYPE = torch.bfloat16
BLOCK = 32
GREEDY = SamplingParams(temperature=0.0)
MOST_RUNNING = 256
TOKEN_BUDGET = 2048
"""Tokens of a step: prompts are computed in so few steps that all requests then decode together."""

PATIENCE = 30
"""Seconds without a token after which a case is given up."""

HOST_COPIES = 8
"""Adapters in host memory; every slot of the device has bytes of its own all the same."""


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that decode side by side.

    Attributes:
        adapters: different adapters among them; 0 for the base.
        prompt, output: tokens of each.
        ranks: ranks of the adapters, in turn.
        popular: most requests use few of the adapters (Zipf with exponent 1).
        churn: every so many steps another adapter is loaded and the last one removed; 0: never.
    """

    name: str
    rows: int
    adapters: int
    prompt: int
    output: int = 128
    ranks: tuple[int, ...] = (16,)
    popular: bool = False
    churn: int = 0


CASES = (
    Case("base_1", 1, 0, 896),
    Case("base_16", 16, 0, 896),
    Case("adapters_16", 16, 16, 896),
    Case("base_64", 64, 0, 896, output=160),
    Case("adapters_64", 64, 64, 896, output=160),
    Case("churn_64", 64, 64, 896, output=160, churn=10),
    Case("zipf_64", 64, 32, 896, output=160, ranks=(8, 16, 32, 64), popular=True),
    Case("base_256", 256, 0, 256, output=160),
)

DRY_CASES = (
    Case("base_1", 1, 0, 5, output=3),
    Case("adapters_2", 2, 2, 5, output=4, ranks=(4, 8), churn=2),
)


@dataclass
class Served:
    """What a case took.

    Attributes:
        steps: seconds and tokens of every step.
        first: seconds from the start to each request's first token.
    """

    steps: list[tuple[float, int]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def full(self, rows: int) -> list[float]:
        """Seconds of the steps that gave every request a token, without the first few."""
        found = [seconds for seconds, tokens in self.steps if tokens == rows]
        return found[4:] or found


class SyntheticRunner(LocalRunner):
    """A runner whose adapters are made up instead of read: `adapters` holds them by digest."""

    adapters: dict[str, ReadAdapter]

    def read_adapter(self, ref: AdapterRef) -> ReadAdapter:
        """See `ModelRunner`."""
        return self.adapters[ref.digest]


def run(report: StageReport) -> None:
    """Serves every case for which time is left."""
    torch.manual_seed(0)
    cases = DRY_CASES if report.dry else CASES
    model = inputs.TINY if report.dry else inputs.LLAMA_8B
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "base"
        file.touch()
        runner = build(model, report, cases, file)
        core = EngineCore(
            runner,
            EngineLimits(token_budget=TOKEN_BUDGET, max_running=MOST_RUNNING, max_waiting=512),
        )
        report.figure("start_s", time.perf_counter() - began)
        results: dict[str, dict[str, float]] = {}
        for case in cases:
            estimate = 2 + case.rows * (case.prompt / 8000 + case.output / 5000)
            if not report.dry and report.left < estimate:
                report.note(f"no time was left for {case.name}")
                continue
            results[case.name] = one_case(report, core, runner, case)
            for figure in ("tok_s", "roofline_share", "step_p50_ms", "step_p99_ms", "ttft_p50_s"):
                report.figure(figure, {name: own[figure] for name, own in results.items()})
        if "churn_64" in results and "adapters_64" in results:
            slower = results["churn_64"]["step_p50_ms"] / results["adapters_64"]["step_p50_ms"]
            report.figure("churn_cost", slower - 1)
            report.check(
                slower < 1.05, f"loads and evictions make steps {slower:.2f} times as long"
            )
        report.table(
            ["case", "tok/s", "share of roofline", "step p50 ms", "p99 ms", "first token s"],
            [[name, *own.values()] for name, own in results.items()],
        )
        waits(report, core, runner, cases[-1] if report.dry else CASES[1])


def build(
    model: inputs.DecoderConfig, report: StageReport, cases: Sequence[Case], file: Path
) -> SyntheticRunner:
    """A runner as `runner.local.build` makes it, over random weights."""
    device = torch.device(report.device)
    tokens = max(case.rows * (case.prompt + case.output + BLOCK) for case in cases)
    weights = inputs.random_weights(model, DTYPE, report.device)
    ranks = sorted({rank for case in cases for rank in case.ranks})
    packed = {rank: inputs.adapter_of(model, rank, DTYPE) for rank in ranks}
    copies = {rank: HOST_COPIES if rank == ranks[0] or rank == 16 else 2 for rank in ranks}
    # There is room for the adapters of two cases and for those that are exchanged meanwhile.
    budget = max(case.adapters * packed[max(case.ranks)].nbytes for case in cases) * 2
    budget += 8 * packed[ranks[-1]].nbytes
    host = 2 * sum(packed[rank].nbytes * count for rank, count in copies.items())
    memory = adapter_memory(device, budget, host, 1024)
    blocks = -(-tokens // BLOCK) + 8
    positions = max(case.prompt + case.output for case in cases) + BLOCK
    if report.dry:
        decoder: Decoder = CudaDecoder(weights, blocks, BLOCK, 1024, max_positions=positions)
    else:
        decoder = open_decoder(
            weights,
            blocks,
            1024,
            max_positions=positions,
            cache=file.parent / "cache",
            serving=ServingSizes(max_rows=TOKEN_BUDGET, max_draws=MOST_RUNNING, max_rank=64),
        )
        assert isinstance(decoder, CudaDecoder), "Triton's kernels cannot be used"
    runner = SyntheticRunner(
        decoder=decoder,
        base_file=MappedFile(file),
        info=info(weights, report.device, blocks * BLOCK),
        limits=AdapterLimits(max_rank=64, max_virtual_tokens=0, max_context=positions),
        merge_dtype=DTYPE,
        num_blocks=blocks,
        prefix_blocks=0,
        block_size=BLOCK,
        adapter_budget_bytes=budget,
        host_budget_bytes=host,
        merge_budget_bytes=0,
        memory=memory,
    )
    runner.adapters = {}
    own: dict[int, list[ReadAdapter]] = {rank: [] for rank in ranks}
    for rank, count in copies.items():
        for _ in range(count):
            data = memory.zeros(packed[rank].nbytes)
            data.copy_(inputs.random_copy(packed[rank], report.device, 0.01).data)
            own[rank].append(ReadAdapter(replace(packed[rank], data=data), 0))
    for case in cases:
        for i in range(case.adapters + 32 * bool(case.churn)):
            alike = own[case.ranks[i % len(case.ranks)]]
            runner.adapters[digest(case, i)] = alike[i % len(alike)]
    return runner


def info(weights: BaseWeights, device: str, context: int) -> ModelInfo:
    """The description of the synthetic model."""
    return ModelInfo(
        base=weights.info,
        name="synthetic",
        device=device,
        kernels="Triton",
        tokenizer_path="",
        max_context=context,
        eos_token_ids=[0],
    )


def digest(case: Case, number: int) -> str:
    """The name of a case's adapter."""
    return f"sha256:{case.ranks[number % len(case.ranks)]:032x}{number:032x}"


def chosen_adapter(case: Case, row: int) -> int:
    """The adapter of a request."""
    if not case.popular:
        return row % case.adapters
    shares = [1 / (rank + 1) for rank in range(case.adapters)]
    wanted = (row + 0.5) / case.rows * sum(shares)
    sums = itertools.accumulate(shares)
    return next(i for i, total in enumerate(sums) if total >= wanted)


def one_case(
    report: StageReport, core: EngineCore, runner: SyntheticRunner, case: Case
) -> dict[str, float]:
    """Serves a case; returns its figures, in the order of the table."""
    served = serve(core, case, report.device)
    report.check(
        not served.errors, f"{case.name}: {len(served.errors)} errors: {served.errors[:1]}"
    )
    tokens = sum(count for _, count in served.steps)
    expected = case.rows * case.output
    report.check(tokens == expected, f"{case.name}: {tokens} tokens instead of {expected}")
    times = sorted(served.full(case.rows))
    if not times:
        report.check(False, f"{case.name}: no step gave every request a token")
        times = [float("nan")]
    step = statistics.mean(times)
    limit = roofline(runner, case, report)
    return {
        "tok_s": case.rows / step,
        "roofline_share": limit / step,
        "step_p50_ms": statistics.median(times) * 1e3,
        "step_p99_ms": times[min(len(times) - 1, int(len(times) * 0.99))] * 1e3,
        "ttft_p50_s": statistics.median(served.first.values()) if served.first else float("nan"),
    }


numbers = itertools.count(1)


def serve(core: EngineCore, case: Case, device: str) -> Served:
    """Submits a case's requests at once and steps until all are answered."""
    vocab = 200 if device == "cpu" else 100_000
    random = torch.Generator().manual_seed(next(numbers))
    served = Served()
    began = time.perf_counter()
    for row in range(case.rows):
        ids = torch.randint(3, vocab, (case.prompt,), generator=random).tolist()
        refs = []
        if case.adapters:
            refs = [AdapterRef(digest(case, chosen_adapter(case, row)), "")]
        core.add(Submit(next(numbers), ids, case.output, adapters=refs, sampling=GREEDY))
    extra = case.adapters
    progress = began
    while not core.idle:
        start = time.perf_counter()
        if start - progress > PATIENCE:
            served.errors.append(f"no token for {PATIENCE} s")
            break
        tokens = 0
        for message in core.step():
            if not isinstance(message, StepReport):
                continue
            for output in message.outputs:
                tokens += len(output.token_ids)
                if output.token_ids:
                    served.first.setdefault(output.id, time.perf_counter() - began)
                if output.error is not None:
                    served.errors.append(str(output.error))
        end = time.perf_counter()
        served.steps.append((end - start, tokens))
        if tokens:
            progress = end
        if case.churn and tokens and len(served.steps) % case.churn == 0:
            exchange(core, case, extra)
            extra += 1
    synchronise(device)
    return served


def exchange(core: EngineCore, case: Case, extra: int) -> None:
    """Loads an adapter that no request uses, and removes the one that was loaded before."""
    last = case.adapters + 31
    if extra <= last:
        core.control(Load(next(numbers), AdapterRef(digest(case, extra), "")))
    if case.adapters < extra <= last:
        core.control(Unload(next(numbers), digest(case, extra - 1)))


def roofline(runner: SyntheticRunner, case: Case, report: StageReport) -> float:
    """Seconds of a step that only reads what it must, at the bandwidth of a copy (S0)."""
    config = runner.decoder.weights.config
    size = DTYPE.itemsize
    context = case.prompt + case.output / 2
    used = (
        {digest(case, chosen_adapter(case, r)) for r in range(case.rows)} if case.adapters else ()
    )
    nbytes = inputs.blocks_of_weights(config) + config.vocab_size * config.hidden_size * size
    nbytes += case.rows * context * 2 * config.num_layers * config.kv_size * size
    nbytes += sum(runner.adapters[name].nbytes for name in used)
    return nbytes / ((report.other("S0").get("copy_tb_s") or 3.0) * 1e12)


def waits(report: StageReport, core: EngineCore, runner: SyntheticRunner, case: Case) -> None:
    """Counts the times that the host waits for the device in a step in which all decode."""
    decoder: Any = runner.decoder
    short = Case("waits", case.rows, case.adapters, 4, output=6, ranks=case.ranks)
    if report.device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                serve(core, short, report.device)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        hidden = [str(w.message)[:120] for w in caught if "synchroniz" in str(w.message)]
        report.figure("unwanted_waits", len(hidden))
        report.check(not hidden, f"{len(hidden)} operations waited for the device: {hidden[:1]}")
    before = decoder.transfers.synchronisations
    served = serve(core, short, report.device)
    count = decoder.transfers.synchronisations - before
    steps = sum(1 for _, tokens in served.steps if tokens)
    report.figure("waits_per_step", count / steps)
    report.check(count <= steps + 2, f"{count} waits in {steps} steps")
