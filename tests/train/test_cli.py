"""What `loraplex-train` takes, says and returns."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Problem, Reason
from loraplex_training import session
from loraplex_training.methods import METHODS
from loraplex_training.publish.target import TARGET, Target, keep, kept
from loraplex_training.report.events import (
    Evaluated,
    Failed,
    JobEnded,
    JobStatus,
    Published,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepDone,
)
from loraplex_training.report.lines import decode
from loraplex_training.run import plan as reports
from loraplex_training.step.divergence import DivergenceWatch

from train import commands
from train.commands import Place, invoke


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_KERNELS_DIR", str(commands.KERNELS))
        yield commands.make(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def finished(place: Place) -> tuple[Place, str]:
    """A run that registered its adapter, and what it printed."""
    log = place.top / "events.jsonl"
    done = place.run(
        "done", store=place.top / "store", label="team=a", alias="best", metric="exact", events=log
    )
    assert done.exit_code == 0, done.output
    return place, done.output


def test_a_run_leaves_a_folder_that_says_all_about_it(finished: tuple[Place, str]) -> None:
    place, _ = finished
    out = place.top / "done"
    names = {path.name for path in out.iterdir()}
    assert {"config.toml", "environment.json", "metrics.jsonl", "curves.png", "job"} <= names
    (data,) = json.loads((out / "data.json").read_text()).values()
    assert data["sha256"] == hashlib.sha256(place.data.read_bytes()).hexdigest()
    assert data["train"]["examples"] + data["evaluation"]["examples"] == 24
    samples = (out / "samples.md").read_text()
    assert (samples.count("before training:"), samples.count("after 3 steps:")) == (3, 3)
    held = {path.name for path in (out / "job" / "adapter").iterdir()}
    assert held == {"adapter_config.json", "adapter_model.safetensors", "README.md", "curves.png"}
    assert list((out / "tensorboard" / "job").iterdir())
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_event_is_a_line_of_the_file_in_order(finished: tuple[Place, str]) -> None:
    place, _ = finished
    told = commands.events((place.top / "events.jsonl").read_text())
    kinds = [type(event) for event in told]
    assert kinds[0] is RunStarted
    assert kinds[-2:] == [RunEnded, Published]
    assert [e.step for e in told if isinstance(e, StepDone)] == [1, 2, 3]
    evaluated = [e for e in told if isinstance(e, Evaluated)]
    assert [e.step for e in evaluated][:: len(evaluated) - 1] == [0, 3]
    assert all(e.metric is not None for e in evaluated)
    assert {e.step for e in told if isinstance(e, Sampled)} == {0, 3}
    assert commands.events((place.top / "done" / "metrics.jsonl").read_text()) == told


def test_the_adapter_is_in_the_store_with_its_labels_and_alias(
    finished: tuple[Place, str],
) -> None:
    place, said = finished
    with Store(place.top / "store") as store:
        record = store.resolve("best")
        assert record.id == "job@1"
        assert record.labels == {"team": "a"}
        assert record.provenance["data_sha256"]
        assert record.digest in said


def test_what_a_run_tells_people(finished: tuple[Place, str]) -> None:
    _, said = finished
    assert re.search(r"job: step 3/3  loss \d", said)
    assert re.search(r"tok/s", said)
    assert re.search(r"step 3: eval loss [\d.]+, perplexity [\d.]+, correct 0.0%", said)
    assert re.search(r"expected peak memory: [\d.]+ [MG]B", said)
    assert re.search(r"peak memory [\d.]+ [MG]B \(expected [\d.]+ [MG]B, [+-]\d+%\)", said)
    assert said.count("    answer ") == 6  # three examples, before and after


def test_a_finished_run_that_is_resumed_is_handed_over_again(finished: tuple[Place, str]) -> None:
    place, said = finished
    again = invoke("resume", str(place.top / "done"))
    assert again.exit_code == 0, again.output
    (digest,) = set(re.findall(r"sha256:[0-9a-f]{64}", again.output))
    assert digest in said
    with Store(place.top / "store") as store:
        assert len(store.versions("job")) == 1


def test_nothing_but_events_goes_to_standard_output_if_they_do(place: Place) -> None:
    done = place.run("piped", events="-")
    assert done.exit_code == 0
    assert [type(event) for event in commands.events(done.stdout)][-1] is Published
    assert "eval loss" in done.stderr


def test_a_sweep_takes_several_words_and_ends_with_a_table(place: Place) -> None:
    done = place.run(
        "sweep", "--sweep", "r=1,2", "lr=1e-3", set=None, store=place.top / "swept", alias="best"
    )
    assert done.exit_code == 0, done.output
    assert "jobs, by evaluation loss" in done.output
    with Store(place.top / "swept") as store:
        ranks = {record.name: record.rank for record in store.page().records}
        assert ranks == {"job-r1-lr1e-3": 1, "job-r2-lr1e-3": 2}
        losses = {
            e.job: e.loss
            for e in commands.events((place.top / "sweep" / "metrics.jsonl").read_text())
            if isinstance(e, Evaluated) and e.best
        }
        assert store.resolve("best").name == min(losses, key=losses.__getitem__)


def test_all_mistakes_in_options_are_told_at_once(place: Place) -> None:
    done = place.run("bad", "--set", "nonsense", lr="fast", learn="nothing", name="Bad Name")
    assert done.exit_code == 2
    assert "nonsense" in done.stderr
    done = place.run("bad", lr="fast", learn="nothing", batch_size=0)
    assert done.exit_code == 2
    for word in ("lr", "learn", "batch_size"):
        assert word in done.stderr
    assert not (place.top / "bad").exists()


def test_all_bad_lines_are_told_at_once(place: Place) -> None:
    data = place.top / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\nnot json\n')
    done = place.run("bad", data=data)
    assert done.exit_code == 2
    told = [bool(re.search(rf"DATA_INVALID: .*bad\.jsonl:{n}:", done.stderr)) for n in (1, 2, 3)]
    assert told == [False, True, True]
    assert not (place.top / "bad").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "lore"}, "did you mean 'lora'"),
        ({"method": "full"}, "full fine-tuning"),
        ({"set": "target_modules=q_prod"}, "q_prod"),
        ({"set": "rank=4"}, "rank"),
        ({"model": "/nowhere"}, "nowhere"),
        ({"alias": "best"}, "--store or --serve"),
        ({"alias": "A b", "store": "s"}, "A b"),
        ({"save_dtype": "int8"}, "int8"),
        ({"metric": "regex:("}, "regex"),
        ({"label": "team"}, "KEY=VALUE"),
    ],
)
def test_a_mistake_is_told_with_what_to_do(
    place: Place, changes: dict[str, Any], says: str
) -> None:
    done = place.run("bad", **changes)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert not (place.top / "bad").exists()


def test_an_unknown_instruction_set_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_ISA", "avx9")
    for command in (place.flags("bad"), [*place.flags("bad"), "--json"]):
        done = invoke("plan" if "--json" in command else "run", *command)
        assert done.exit_code == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: CONFIG_INVALID: LORAPLEX_ISA is 'avx9', ")


def test_programs_get_every_refusal_as_an_event(place: Place, tmp_path: Path) -> None:
    flags = {"lr": "fast", "batch_size": 0}
    log = tmp_path / "events.jsonl"
    for command, lines in (
        (["run", *place.flags("bad", events="-", **flags)], None),
        (["run", *place.flags("bad", events=log, **flags)], log),
        (["plan", *place.flags("bad", **flags), "--json"], None),
    ):
        done = invoke(*command)
        assert done.exit_code == 2
        (failed,) = commands.events(lines.read_text() if lines else done.stdout)
        assert isinstance(failed, Failed)
        assert failed.reason == "CONFIG_INVALID"
        assert {problem.field for problem in failed.problems} == {
            "jobs.job.lr", "jobs.job.batch_size"
        }  # fmt: skip
    done = place.run("bad", events="-", data=tmp_path / "none.jsonl")
    (failed,) = commands.events(done.stdout)
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.problems[0].field) == ("DATA_INVALID", "data")
    done = place.run("bad", events=tmp_path)  # a directory
    assert done.exit_code == 2
    assert "--events" in done.stderr


def test_a_word_too_many_is_refused(place: Place) -> None:
    done = place.run("bad", "surplus")
    assert done.exit_code == 2
    assert "surplus" in done.stderr


def test_a_folder_that_holds_a_run_is_not_taken(finished: tuple[Place, str]) -> None:
    place, _ = finished
    done = place.run("done")
    assert done.exit_code == 2
    assert "resume" in done.stderr


def test_without_a_folder_of_one_s_own_a_second_run_gets_the_next(
    finished: tuple[Place, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, _ = finished
    monkeypatch.chdir(tmp_path)
    for folder in ("job", "job-2"):
        done = invoke("run", *place.flags(None, steps=1), "--sweep", "r=2,3")
        assert done.exit_code == 0, done.output
        assert len(list((tmp_path / "var" / "runs" / folder).glob("*/adapter"))) == 2


def test_a_signal_saves_the_run_and_says_how_to_go_on(place: Place) -> None:
    number, out = signal.SIGTERM, "stopped"
    flags = place.flags(out, steps=100_000, save_every=99_999)
    child = commands.start("run", *flags, "--events", "-")
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if '"StepDone"' in line:
                break
        child.send_signal(number)
        rest, said = child.communicate(timeout=240)
    finally:
        child.kill()
    assert child.returncode == 128 + number
    assert "loraplex-train resume" in said
    told = commands.events(rest)
    steps = [e.step for e in told if isinstance(e, StepDone | Saved)]
    assert steps[-1] == max(steps)
    assert isinstance(told[-1], RunEnded)
    assert not any(isinstance(e, JobEnded) for e in told)


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping:
        stops = 0

        def stop(self) -> None:
            self.stops += 1

    ended: list[int] = []
    monkeypatch.setattr(session.os, "_exit", ended.append)
    run = Stopping()
    before = signal.getsignal(signal.SIGINT)
    with session._stoppable(run) as received:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        assert (run.stops, received, ended) == (1, [signal.SIGINT], [])
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_diverges_fails(place: Place) -> None:
    done = place.run("wild", lr=1e30, steps=30, set="lora_alpha=1e4", clip=0)
    assert done.exit_code == 1
    assert "diverged" in done.output
    assert not (place.top / "wild" / "job" / "adapter").exists()


def test_a_job_with_no_adapter_worth_keeping_says_why_as_an_event(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DivergenceWatch, "limit", 0.0)
    events = place.top / "lost.jsonl"
    done = place.run("lost", lr=1e-2, warmup=0, steps=2, events=events)
    assert done.exit_code == 1
    seen = [decode(line) for line in events.read_text().splitlines()]
    (ended,) = [event for event in seen if isinstance(event, JobEnded)]
    assert ended.state is JobStatus.FINISHED
    assert seen[-1] == Failed(
        Reason.DIVERGED, (Problem("jobs.job", ended.reason, Reason.DIVERGED),)
    )


def test_where_adapters_go_is_kept_without_the_database_s_secret(tmp_path: Path) -> None:
    target = Target(tmp_path, "postgresql://u:secret@h/d", "best", {"a": "b"}, "h:1", "bfloat16")
    keep(target, tmp_path)
    text = (tmp_path / TARGET).read_text()
    assert "secret" not in text
    again = kept(tmp_path)
    assert (again.store, again.alias, again.server, again.dtype) == (
        tmp_path,
        "best",
        "h:1",
        "bfloat16",
    )
    assert json.loads(text)["labels"] == {"a": "b"}


def test_inspect_shows_tokens_and_counts(place: Place) -> None:
    model = ["--model", str(place.top / "model"), "--cache", str(place.top / "cache")]
    done = invoke("inspect", "--data", str(place.data), *model, "--count", "1")
    assert done.exit_code == 0, done.output
    assert "learned" in done.output
    assert "training" in done.output


def test_plan_says_what_a_run_would_take_and_writes_nothing(place: Place) -> None:
    done = invoke("plan", *place.flags("planned", steps=7))
    assert done.exit_code == 0, done.output
    assert re.search(r"lora", done.output)
    assert "estimated from one pass" in done.output
    told = invoke("plan", *place.flags("planned", steps=7), "--json")
    plan = json.loads(told.stdout.splitlines()[-1])
    assert plan["bytes"] == sum(plan["memory"].values()) > 1 << 20
    assert (plan["device"], plan["available_bytes"]) == ("cpu", None)
    (job,) = plan["jobs"]
    assert (job["name"], job["steps"]) == ("job", 7)
    samples = [json.loads(line) for line in place.data.read_text().splitlines()]
    longest = max(len(s["prompt"]) + len(s["completion"]) for s in samples)
    assert 0 < job["tokens"] <= 7 * 2 * (longest + 2)
    assert plan["seconds"] > 0
    assert not (place.top / "planned").exists()


def make(*words: str) -> str:
    """What `make train-adapter` would run."""
    command = ["make", "-n", "-o", "setup", "-o", "model", "train-adapter", *words]
    done = subprocess.run(
        command, cwd=commands.ROOT, check=True, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k not in ("DATA", "NAME", "ARGS")},
    )  # fmt: skip
    return done.stdout


def test_make_trains_on_any_file_and_shows_off_without_one() -> None:
    command = make("DATA=a.jsonl", "NAME=mine", "ARGS=--set r=8 --epochs 1")
    assert (
        '-m loraplex_training run --data "a.jsonl" --name "mine" --store var/store '
        "--set r=8 --epochs 1"
    ) in command
    assert "examples/train_adapter.py" not in command
    alone = make()
    assert "examples/train_adapter.py" in alone
    assert "--data" not in alone


def test_every_method_is_listed_with_its_options() -> None:
    done = invoke("methods")
    assert done.exit_code == 0
    for name in METHODS:
        assert name in done.output
    assert "Full fine-tuning is not among them" in done.output
    assert "num_virtual_tokens" in re.sub(r"\s", "", done.output)
    assert reports.described(test_every_method_is_listed_with_its_options) == ""
