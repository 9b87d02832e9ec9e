"""Options are read strictly, all problems are told at once, and a run can be written down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_training.cli import app
from loraplex_training.spec import parse as options
from loraplex_training.spec.fields import located
from loraplex_training.spec.flags import with_flags
from loraplex_training.spec.spec import (
    RATES,
    DataSpec,
    JobSpec,
    MethodSpec,
    OptimSpec,
    RunSpec,
    ScheduleName,
)
from transformers import SchedulerType
from typer.main import get_command
from typer.testing import CliRunner

GIVEN = {"data": "d.jsonl", "name": "a"}


def refused(*arguments: Any, **keywords: Any) -> list[str]:
    with pytest.raises(Refusal) as caught:
        options.read(*arguments, **keywords)
    assert caught.value.reason == "CONFIG_INVALID"
    return list(map(located, caught.value.problems))


def test_flags_reach_every_part() -> None:
    spec = options.read(
        GIVEN
        | {
            "method": "dora",
            "optimiser": "sgd",
            "lr": "3e-3",
            "betas": "0.8,0.95",
            "batch-size": "2",
            "epochs": "1.5",
            "pack": "true",
            "eval_data": "e.jsonl",
            "max-length": "64",
            "threads": "2",
            "out": "somewhere",
        },
        {"r": "8", "target_modules": "q_proj,v_proj", "use_rslora": "true", "layers": "[1, 2]"},
    )
    (job,) = spec.jobs
    assert job == JobSpec(
        "a",
        DataSpec(Path("d.jsonl"), Path("e.jsonl"), max_length=64),
        MethodSpec(
            "dora",
            {"r": 8, "target_modules": "q_proj,v_proj", "use_rslora": True, "layers": [1, 2]},
        ),
        OptimSpec("sgd", lr=3e-3, betas=(0.8, 0.95)),
        epochs=1.5,
        batch_size=2,
        pack=True,
    )
    assert (spec.threads, spec.out) == (2, Path("somewhere"))


def test_several_files_have_weights_and_columns_other_names(tmp_path: Path) -> None:
    spec = options.read(
        {
            "name": "a",
            "data": ["a.jsonl", "b,c.csv"],
            "data-weights": "0.7,0.3",
            "columns": "prompt=question, completion=the answer",
            "roles": "human=user",
            "shape": "prompt",
        }
    )
    assert spec.jobs[0].data == DataSpec(
        (Path("a.jsonl"), Path("b,c.csv")),
        weights=(0.7, 0.3),
        columns={"prompt": "question", "completion": "the answer"},
        roles={"human": "user"},
        shape="prompt",
    )
    assert options.from_mapping(tomllib.loads(options.to_toml(spec))) == spec
    assert options.from_mapping(json.loads(json.dumps(options.to_mapping(spec)))) == spec
    assert [path.is_absolute() for path in options.absolute(spec).jobs[0].data.paths] == [True] * 2
    one = options.read({"name": "a", "data": ["a.jsonl"]})
    assert one == options.read({"name": "a", "data": "a.jsonl"})
    assert options.to_mapping(one)["job"][0]["data"] == "a.jsonl"  # as it always was


def test_a_run_that_was_written_before_these_options_is_read() -> None:
    spec = options.read(GIVEN)
    old = options.to_mapping(spec)
    for name in ("data_weights", "columns", "shape", "roles"):
        del old["job"][0][name]
    assert options.from_mapping(old) == spec


def test_a_flag_may_be_repeated_only_for_data() -> None:
    given: list[dict[str, str | list[str]]] = []

    @with_flags(("data", "seed", "pack"))
    def take(*, flags: dict[str, str | list[str]]) -> None:
        given.append(flags)

    own = typer.Typer()
    own.command()(take)
    for words in ("", "--data a --seed 3 --pack", "--data a --data b"):
        assert CliRunner().invoke(own, words.split()).exit_code == 0
    assert given == [{}, {"data": ["a"], "seed": "3", "pack": "True"}, {"data": ["a", "b"]}]
    repeated = [p.name for p in get_command(app).commands["run"].params if p.multiple]
    assert "data" in repeated
    assert set(repeated) <= {"data", "set_", "sweep", "label"}


def test_what_is_not_said_is_the_specs_own_default() -> None:
    spec = options.read(GIVEN)
    assert spec.jobs == (JobSpec("a", DataSpec(Path("d.jsonl"))),)
    assert spec == RunSpec(spec.jobs, Path("var/runs/a"))


def test_a_sweep_is_the_cross_product_with_names_that_say_it() -> None:
    spec = options.read(GIVEN | {"seed": "3"}, {"r": "1"}, ["r=4,16,64", "lr=1e-4,3e-4"])
    assert [job.name for job in spec.jobs] == [
        f"a-r{r}-lr{lr}" for r in (4, 16, 64) for lr in ("1e-4", "3e-4")
    ]
    assert [(job.method.options["r"], job.optim.lr) for job in spec.jobs] == [
        (r, lr) for r in (4, 16, 64) for lr in (1e-4, 3e-4)
    ]
    assert {job.seed for job in spec.jobs} == {3}
    assert spec.out == Path("var/runs/a")


def test_a_file_with_jobs_a_run_and_a_sweep(tmp_path: Path) -> None:
    config = tmp_path / "jobs.toml"
    config.write_text(
        """
        [run]
        model = "somewhere"
        save_every = 7
        [[job]]
        name = "one"
        data = "1.jsonl"
        options = { r = 4 }
        lr = 1
        [[job]]
        name = "two"
        data = "2.jsonl"
        method = "ia3"
        [sweep]
        lr = [1e-4, 0.02]
        target_modules = ["q_proj", ["q_proj", "v_proj"]]
        """
    )
    spec = options.read({"save-every": "9", "epochs": "2"}, {"init": "gaussian"}, (), config)
    assert (spec.model, spec.save_every) == ("somewhere", 9)
    assert [job.name for job in spec.jobs] == [
        f"{name}-lr{lr}-target-modules{targets}"
        for name in ("one", "two")
        for lr in ("1e-4", "0-02")
        for targets in ("q-proj", "q-proj-v-proj")
    ]
    assert {job.epochs for job in spec.jobs} == {2.0}
    assert spec.jobs[1].method.options == {
        "r": 4, "init": "gaussian", "target_modules": ["q_proj", "v_proj"]
    }  # fmt: skip
    assert {job.method.name for job in spec.jobs[4:]} == {"ia3"}


def test_the_file_in_the_documentation_is_understood() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text("utf-8")
    spec = options.from_mapping(tomllib.loads(text.partition("```toml\n")[2].partition("```")[0]))
    assert [job.name for job in spec.jobs] == ["orders", "tickets"]
    assert [job.method.name for job in spec.jobs] == ["lora", "ia3"]
    assert (spec.out, spec.save_every) == (Path("var/runs/desk"), 100)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    config = tmp_path / "jobs.toml"
    config.write_text(
        """
        top = 1
        [run]
        modle = "x"
        save_every = 0
        [[job]]
        name = "Not A Name"
        data = "d"
        lr = -1
        [[job]]
        name = "b"
        batch_size = 0.5
        learning = 3
        patience = -1
        """
    )
    problems = refused({"epoch": "1"}, config=config)
    for expected in (
        "--epoch: there is no 'epoch' (did you mean 'epochs'?)",
        "[run]: there is no 'modle' (did you mean 'model'?)",
        "[run]: save_every is 0; it should be at least 1",
        "job 'Not A Name': lr is -1; it should be above 0",
        "job 'b': data is missing",
        "job 'b': batch_size is 0.5; it should be a whole number",
        "job 'b': patience is -1; it should be at least 0",
    ):
        assert expected in problems
    assert any(p.startswith("the file: there is no 'top'") for p in problems)
    assert any(p.startswith("job 'b': there is no 'learning'") for p in problems)
    assert any("1 to 63 characters" in p for p in problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "0"),
        ("lr", "nan"),
        ("lr", "inf"),
        ("lr", "fast"),
        ("betas", "0.9"),
        ("betas", "0.9,1"),
        ("eps", "0"),
        ("weight_decay", "-0.1"),
        ("schedule", "cosin"),
        ("optimiser", "adam"),
        ("warmup", "1"),
        ("clip", "-1"),
        ("epochs", "0"),
        ("steps", "-1"),
        ("steps", "1.5"),
        ("batch_size", "0"),
        ("accumulation", "0"),
        ("max_tokens", "1"),
        ("max_length", "1"),
        ("data", ["a", "a"]),
        ("data", []),
        ("data_weights", "1,2"),
        ("data_weights", "0"),
        ("data_weights", "many"),
        ("columns", "prompt"),
        ("columns", "prompt="),
        ("columns", "a=c,b=c"),
        ("roles", "human"),
        ("eval_every", "-1"),
        ("eval_fraction", "1"),
        ("eval_fraction", "-0.1"),
        ("patience", "-1"),
        ("metric", "similar"),
        ("metric", "regex:("),
        ("metric_examples", "0"),
        ("learn", "everything"),
        ("seed", "-1"),
        ("pack", "maybe"),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("threads", "-1"),
        ("save_every", "0"),
        ("keep", "0"),
        ("name", "-a"),
    ],
)
def test_values_out_of_range_are_refused_by_name(key: str, value: str) -> None:
    problems = refused(GIVEN | {key: value})
    assert len(problems) == 1
    assert key in problems[0]


@pytest.mark.parametrize(
    "sweep", [["r"], ["r="], ["r=4,"], ["name=a,b"], ["batch_size=1,1"], ["seed=" + "1," * 300]]
)
def test_sweeps_that_make_no_sense_are_refused(sweep: list[str]) -> None:
    assert refused(GIVEN, None, sweep)


def test_a_problem_names_its_option() -> None:
    table = {"name": "a", "data": "d", "lr": 0, "learning": 1, "betas": [0.9, 1], "options": 3}
    with pytest.raises(Refusal) as caught:
        options.from_mapping({"run": {"keep": 0}, "job": [table, {"name": "b"}]})
    assert [problem.field for problem in caught.value.problems] == [
        "run.keep",
        "jobs.a.options",
        "jobs.a.lr",
        "jobs.a.betas",
        "jobs.a.learning",
        "jobs.b.data",
    ]
    assert "job 'a': lr is 0; it should be above 0" in str(caught.value)


def test_every_option_is_a_flag_with_a_sentence_of_help_in_a_panel() -> None:
    command = get_command(app).commands["run"]  # type: ignore[attr-defined]
    flags = {param.name: param for param in command.params}
    assert {*options.KEYS, *options.RUN_KEYS} - {"options"} <= flags.keys()
    for name in {*options.KEYS, *options.RUN_KEYS} - {"options"}:
        assert re.fullmatch(r"[A-Z].*\.( \(default: \S+\))?", flags[name].help), name
        assert flags[name].rich_help_panel
    default = {name for name, flag in flags.items() if flag.default is not None}
    assert not default & {*options.KEYS, *options.RUN_KEYS}


def test_help_needs_no_torch() -> None:
    code = "import loraplex_training.cli, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_jobs_and_jobs_of_one_name_are_refused() -> None:
    with pytest.raises(Refusal, match="there is no job"):
        options.from_mapping({"job": []})
    table = {"name": "a", "data": "d"}
    with pytest.raises(Refusal, match="2 jobs are called 'a'"):
        options.from_mapping({"job": [table, table]})


@pytest.mark.parametrize("document", [{"job": 1}, {"job": [1]}, {"run": 1}, {"sweep": 1}])
def test_tables_that_are_none_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        options.from_mapping({"job": [{"name": "a", "data": "d"}]} | document)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(config=tmp_path / "none.toml")[0]
    (tmp_path / "bad.toml").write_text("[run")
    assert "is not TOML" in refused(config=tmp_path / "bad.toml")[0]


def test_the_names_of_schedules_are_transformers() -> None:
    assert set(get_args(ScheduleName)) == {schedule.value for schedule in SchedulerType}


def test_limits_hold_for_a_spec_that_nobody_read() -> None:
    spec = options.read(GIVEN)
    wrong = replace(spec, jobs=(replace(spec.jobs[0], patience=-2),))
    options.check(spec)
    with pytest.raises(Refusal) as caught:
        options.check(wrong)
    assert caught.value.problems == (
        Problem(
            "jobs.a.patience", "patience is -2; it should be at least 0", Reason.CONFIG_INVALID
        ),
    )


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    made=st.dictionaries(TEXT, VALUES, max_size=4),
    system=st.none() | TEXT.filter(bool),
    lr=st.floats(1e-300, 1e300),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    other=st.booleans(),
)
def test_a_run_is_written_and_read_without_a_change(
    made: dict[str, object], system: str | None, lr: float, betas: tuple[float, float], other: bool
) -> None:
    data = DataSpec(Path("a b/ü.jsonl"), Path("e") if other else None, system=system)
    job = JobSpec("a", data, MethodSpec("lora", made), OptimSpec(lr=lr, betas=betas))
    spec = RunSpec((job, replace(job, name="b", pack=True, metric="exact")), Path('o"ut\\'))
    assert options.from_mapping(tomllib.loads(options.to_toml(spec))) == spec
    assert options.from_mapping(json.loads(json.dumps(options.to_mapping(spec)))) == spec


def test_paths_are_made_to_hold_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    spec = options.read(GIVEN | {"model": "base", "eval_data": "e.jsonl"})
    there = options.absolute(spec)
    assert there.model == str(tmp_path / "base")
    assert there.out == tmp_path / "var/runs/a"
    assert there.jobs[0].data.path == tmp_path / "d.jsonl"
    assert there.jobs[0].data.eval_path == tmp_path / "e.jsonl"
    assert options.absolute(options.read(GIVEN)).model == "default"


def test_a_method_has_a_learning_rate_of_its_own_unless_one_is_named() -> None:
    assert options.read(GIVEN).jobs[0].optim.lr == OptimSpec().lr
    assert options.read(GIVEN | {"method": "ia3"}).jobs[0].optim.lr == RATES["ia3"]
    assert options.read(GIVEN | {"method": "ia3", "lr": "0.1"}).jobs[0].optim.lr == 0.1
