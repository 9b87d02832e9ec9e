"""An adapter from its order to its answers: the real trainer beside the real engine, tiny base."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex import AsyncClient, InvalidRequest, JobState
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
            job = await client.training.create(
                "tickets",
                data,
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
            adapter = await client.get_adapter("live")
            assert (adapter.name, adapter.digest) == ("tickets", done.result.digest)
            prompt = {"max_new_tokens": 8, "temperature": 0.0}
            theirs = await client.generate("abc>", adapter="live", **prompt)
            assert theirs.adapters[0].digest == done.result.digest
            base = await client.generate("abc>", **prompt)
            assert theirs.token_ids != base.token_ids
    finally:
        await server.close()
