"""An adapter from its order to its answers: the real trainer beside the real engine, tiny base."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex import AsyncClient, InvalidRequest, JobState, TrainingJob
from loraplex_server.app import Server
from loraplex_server.config import Config
from train import runs

KERNELS = Path(__file__).resolve().parents[2] / "var" / "cache" / "kernels"


@pytest.fixture
def _trainer_plans() -> None:
    """Skips where the trainer cannot say yet what a run takes."""
    shown = subprocess.run(
        [sys.executable, "-m", "loraplex_training", "plan", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    if "--json" not in shown.stdout:
        pytest.skip("the trainer has no plan --json")


async def require_history(client: AsyncClient, done: TrainingJob) -> None:
    """All steps and evaluations are told, samples before and after, and adapters in between."""
    told = await client.training.events(done.job_id)
    steps = [event.progress.step for event in told if event.progress]
    evaluated = [event.evaluation.step for event in told if event.evaluation]
    assert (steps, evaluated) == (list(range(1, 13)), [0, 4, 8, 12])
    samples = [event.samples for event in told if event.samples]
    assert [each.step for each in samples] == [0, 12]
    assert [one.prompt for one in samples[0].samples] == [o.prompt for o in samples[1].samples]
    assert all(one.expected for one in samples[0].samples)
    assert [each.step for each in done.checkpoints] == [4, 8, 12]
    best = done.progress.best_evaluation.step
    prompt = {"max_new_tokens": 8, "temperature": 0.0}
    said = {}
    for each in done.checkpoints:
        answer = await client.generate("abc>", adapter=each.adapter_id, **prompt)
        assert answer.adapters[0].digest == each.digest
        said[each.step] = answer.token_ids
    finished = await client.generate("abc>", adapter="tickets", **prompt)
    assert finished.token_ids == said[best]  # the finished adapter is that of the best evaluation


@pytest.mark.slow  # five processes that import torch
@pytest.mark.usefixtures("_trainer_plans")
async def test_what_is_ordered_is_trained_registered_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if KERNELS.is_dir():
        monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(KERNELS))
    model = runs.write_base(tmp_path)
    data = runs.write_data(tmp_path / "data.jsonl")
    config = Config(
        model=str(model),
        dtype="float32",
        device="cpu",
        threads=1,
        store=tmp_path / "store",
        cache=tmp_path / "cache",
        import_root=tmp_path / "import",
        port=0,
        admin_port=0,
        kv_tokens=1024,
        training=True,
        training_jobs_dir=tmp_path / "jobs",
        training_threads=1,
    )
    server = Server(config)
    try:
        await server.start()
        async with AsyncClient(str(server.address), timeout=120.0) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.training.create("broken", b'{"prompt": 1}\nno json\n', steps=1)
            assert len(caught.value.violations) >= 2
            stored = await client.training.upload_data(data)
            job = await client.training.create(
                "tickets",
                data_id=stored.data_id,
                eval_every=4,
                checkpoints=True,
                options={"r": 2},
                steps=12,
                batch_size=4,
                learning_rate=0.05,
                max_length=64,
                eval_fraction=0.25,
                load=True,
                alias="live",
            )
            assert job.estimated_bytes > 0
            seen = [state async for state in client.training.watch(job.job_id)]
            done = seen[-1]
            assert done.state is JobState.SUCCEEDED, done.error
            assert (done.progress.step, done.progress.steps) == (12, 12)
            assert done.progress.best_evaluation is not None
            assert done.result.loaded
            assert done.result.peak_bytes > 0
            assert done.trained_tokens > 0
            await require_history(client, done)
            adapter = await client.get_adapter("live")
            assert (adapter.name, adapter.digest) == ("tickets", done.result.digest)
            prompt = {"max_new_tokens": 8, "temperature": 0.0}
            theirs = await client.generate("abc>", adapter="live", **prompt)
            assert theirs.adapters[0].digest == done.result.digest
            base = await client.generate("abc>", **prompt)
            assert theirs.token_ids != base.token_ids
    finally:
        await server.close()
