"""Fine-tuning with the openai package: jobs, events, checkpoints, and the model they make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from gateway.training import BASE, FineTuning, declared, fine_tuning
from loraplex import AsyncClient
from loraplex_gateway.finetuning.names import adapter_name, model_id
from loraplex_gateway.finetuning.order import BASE_RATE
from loraplex_gateway.models.ids import ModelIds
from loraplex_training.spec.spec import OptimSpec
from rpc.training_jobs import lines

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FineTuning]:
    async with fine_tuning(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(up: FineTuning) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{up.url}/v1", api_key="any", max_retries=0, http_client=declared()
    ) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def http(up: FineTuning) -> AsyncIterator[httpx2.AsyncClient]:
    async with declared(base_url=f"{up.url}/v1") as made:
        yield made


async def upload(client: openai.AsyncOpenAI, *texts: str) -> str:
    """A file that says what the trainer does."""
    file = ("data.jsonl", lines(*texts))
    return (await client.files.create(file=file, purpose="fine-tune")).id


async def ended(client: openai.AsyncOpenAI, job: Any) -> Any:
    while job.status not in {"succeeded", "failed", "cancelled"}:
        await asyncio.sleep(0.02)
        job = await client.fine_tuning.jobs.retrieve(job.id)
    return job


async def test_the_whole_way_from_a_file_to_a_model(
    up: FineTuning, client: openai.AsyncOpenAI
) -> None:
    made = [up.trains.adapter(i) for i in (1, 2)]
    training = await upload(
        client, "sample before", "step 2", "eval 0.5", f"export {made[0]}", "step 4", "eval 0.25",
        f"export {made[1]}", "sample after", f"publish {made[1]}",
    )  # fmt: skip
    validation = await upload(client, "ignored")
    hyperparameters: Any = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    job = await client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training,
        validation_file=validation,
        suffix="Mein Bot! 日本",
        seed=42,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        metadata={"team": "search"},
    )
    assert (job.object, job.model, job.status) == ("fine_tuning.job", BASE, "queued")
    assert (job.training_file, job.validation_file, job.seed) == (training, validation, 42)
    assert job.hyperparameters.to_dict() == hyperparameters
    assert job.method.supervised.hyperparameters.to_dict() == hyperparameters
    assert job.metadata == {"team": "search"}
    assert job.user_provided_suffix == "Mein Bot! 日本"
    assert (job.fine_tuned_model, job.finished_at, job.error) == (None, None, None)
    done = await ended(client, job)
    assert done.status == "succeeded", done.error
    assert done.trained_tokens == 400
    assert done.finished_at >= done.created_at
    assert done.fine_tuned_model.startswith(f"ft:{BASE}::Mein Bot! 日本:")
    assert done.id in [each.id async for each in client.fine_tuning.jobs.list(limit=1)]
    listed = await client.fine_tuning.jobs.list(metadata={"team": "search"})
    assert [each.id for each in listed.data] == [done.id]
    assert (await client.fine_tuning.jobs.list(metadata={"team": "x"})).data == []

    # Both of its names are models, and answer with the bytes that were trained.
    adapter = done.loraplex["adapter"]
    name = adapter.partition("@")[0]
    assert name.startswith("mein-bot-")
    async with AsyncClient(str(up.trains.up.server.address)) as server:
        ids = ModelIds((BASE,))
        for model in (done.fine_tuned_model, name, adapter):
            assert (await client.models.retrieve(model)).id == model
            found = await ids.adapter(server, model)
            said = await server.generate(token_ids=[20, 21], adapter=found, max_new_tokens=2)
            assert [f"{a.name}@{a.version}" for a in said.adapters] == [adapter]
        assert (await server.get_adapter(name)).labels["team"] == "search"
        for model in (done.fine_tuned_model, name):
            reply = await client.chat.completions.with_raw_response.create(
                model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2
            )
            assert reply.headers["x-loraplex-adapter"].split()[0] == adapter
            assert reply.parse().model == model

        points = [each async for each in client.fine_tuning.jobs.checkpoints.list(done.id)]
        assert [each.step_number for each in points] == [4, 2]
        assert points[1].metrics.to_dict() == {
            "step": 2, "train_loss": 0.5, "valid_loss": 0.5, "full_valid_loss": 0.5,
        }  # fmt: skip
        for each in points:
            wanted = f"{done.fine_tuned_model}:ckpt-step-{each.step_number}"
            assert (each.fine_tuned_model_checkpoint, each.fine_tuning_job_id) == (wanted, done.id)
            found = await ids.adapter(server, wanted)
            assert found == f"{name}-step-{each.step_number}"
    page = await client.fine_tuning.jobs.checkpoints.list(done.id, limit=1)
    assert (page.has_more, len(page.data)) == (True, 1)


async def test_events_come_newest_first_and_page_by_page(
    up: FineTuning, client: openai.AsyncOpenAI
) -> None:
    file = await upload(
        client, "sample hi", "step 2", "eval 0.5", f"publish {up.trains.adapter(3)}"
    )
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    await ended(client, job)
    found = [each async for each in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert [each.message for each in found] == [
        "The job has successfully completed",
        "Step 2: validation loss=0.5000",
        found[2].message,
        found[3].message,
        "Answers after step 0",
        "The job is running",
        "The job is queued",
    ]
    assert found[2].message.endswith("training loss=0.5000")
    assert [each.type for each in found[:3]] == ["message", "metrics", "metrics"]
    assert found[1].data == {"step": 2, "valid_loss": 0.5, "full_valid_loss": 0.5}
    assert found[2].data["train_loss"] == 0.5
    assert found[4].data["samples"] == [{"prompt": "p", "answer": "hi", "expected": "r"}]
    assert len({each.id for each in found}) == len(found)
    assert all(each.id.startswith("ftevent-") for each in found)


async def test_a_job_that_fails_says_why(up: FineTuning, client: openai.AsyncOpenAI) -> None:
    file = await upload(client, "step 1", "diverge")
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    done = await ended(client, job)
    assert (done.status, done.fine_tuned_model) == ("failed", None)
    assert (done.error.code, done.error.message) == ("diverged", "the loss is not finite")
    first = (await client.fine_tuning.jobs.list_events(job.id, limit=1)).data[0]
    assert first.level == "error"


async def test_a_job_is_cancelled_and_cannot_be_paused(
    up: FineTuning, client: openai.AsyncOpenAI
) -> None:
    file = await upload(client, "step 1", "hold")
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    for call in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError) as caught:
            await call(job.id)
        assert caught.value.code == "unsupported_operation"
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def test_a_repeated_request_with_one_key_makes_one_job(
    up: FineTuning, client: openai.AsyncOpenAI
) -> None:
    file = await upload(client, "hold")
    key = {"idempotency-key": "once"}
    made = [
        await client.fine_tuning.jobs.create(
            model=BASE, training_file=file, suffix="same", extra_headers=key
        )
        for _ in range(2)
    ]
    assert made[0].id == made[1].id
    with pytest.raises(openai.ConflictError):
        await client.fine_tuning.jobs.create(
            model=BASE, training_file=file, suffix="other", extra_headers=key
        )
    await client.fine_tuning.jobs.cancel(made[0].id)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown model": ({"model": "nobody"}, "model"),
    "a malformed file": ({"training_file": "file-x"}, "training_file"),
    "a missing file": ({"training_file": "file-" + "0" * 12 + "-" + "0" * 8}, "training_file"),
    "a missing validation file": ({"validation_file": "x"}, "validation_file"),
    "dpo": ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
    "reinforcement": ({"method": {"type": "reinforcement"}}, "method.type"),
    "a method that nobody knows": ({"method": {"type": "magic"}}, "method.type"),
    "another hyperparameter": (
        {"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
    "a word for a number": ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
    "no epochs": ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    "a rate below zero": (
        {"hyperparameters": {"learning_rate_multiplier": -1}},
        "hyperparameters.learning_rate_multiplier",
    ),
    "a batch of nothing": ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
    "an integration": ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations"),
    "a long suffix": ({"suffix": "x" * 65}, "suffix"),
    "a negative seed": ({"seed": -1}, "seed"),
    "metadata that is no label": ({"metadata": {"Key": "x"}}, "metadata"),
    "metadata of ours": ({"metadata": {"loraplex.dev/model-id": "x"}}, "metadata"),
    "much metadata": ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    "an unknown field": ({"colour": "red"}, "colour"),
    "an unknown option": ({"loraplex": {"colour": "red"}}, "loraplex.colour"),
    "a wrong option": ({"loraplex": {"learn": "nothing"}}, "loraplex.learn"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_what_cannot_be_done_is_refused_by_name(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, what: str
) -> None:
    changes, param = WRONG[what]
    body = {"model": BASE, "training_file": await upload(client, "hold"), **changes}
    before = (await http.get("/fine_tuning/jobs")).json()
    reply = await http.post("/fine_tuning/jobs", json=body)
    error = reply.json()["error"]
    status = 404 if what == "an unknown model" else 400
    assert (reply.status_code, error["param"]) == (status, param), error
    assert (await http.get("/fine_tuning/jobs")).json() == before


async def test_a_fine_tuned_model_cannot_be_tuned_further(
    up: FineTuning, client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    await up.trains.up.register("tuned", 30, labels={"loraplex.dev/model-id": "ft:tuned"})
    file = await upload(client, "hold")
    for model in ("ft:tuned",):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.fine_tuning.jobs.create(model=model, training_file=file)
        assert caught.value.param == "model"


async def test_wrong_lines_are_named_as_those_of_the_training_file(
    client: openai.AsyncOpenAI,
) -> None:
    file = await upload(client, "refuse DATA_INVALID data.jsonl, line 2: no text")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    assert caught.value.param == "training_file"
    assert "line 2: no text" in caught.value.message


async def test_what_does_not_exist_is_not_found(client: openai.AsyncOpenAI) -> None:
    for job in ("ftjob-x", "ftjob-" + "0" * 12 + "-" + "0" * 8):
        for call in (
            client.fine_tuning.jobs.retrieve,
            client.fine_tuning.jobs.cancel,
            client.fine_tuning.jobs.list_events,
            client.fine_tuning.jobs.checkpoints.list,
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await call(job)
            assert caught.value.code == "fine_tune_not_found"


async def test_options_of_the_server_pass_through(
    up: FineTuning, client: openai.AsyncOpenAI
) -> None:
    file = await upload(client, "hold")
    extra = {"loraplex": {"method": "dora", "options": {"r": 4}, "steps": 3, "learning_rate": 0.1}}
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body=extra)
    async with AsyncClient(str(up.trains.up.server.address)) as server:
        known = await server.training.get(job.id.removeprefix("ftjob-"))
        assert (known.method, dict(known.options)) == ("dora", {"r": "4"})
        assert (known.settings.steps, known.learning_rate) == (3, 0.1)
    await client.fine_tuning.jobs.cancel(job.id)


async def test_a_job_from_elsewhere_is_shown_too(
    up: FineTuning, client: openai.AsyncOpenAI
) -> None:
    made = await up.trains.create(f"publish {up.trains.adapter(40)}", name="elsewhere")
    done = await ended(client, await client.fine_tuning.jobs.retrieve(f"ftjob-{made.job_id}"))
    assert (done.fine_tuned_model, done.training_file) == ("elsewhere", "")
    assert done.hyperparameters.to_dict() == {
        "n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto",
    }  # fmt: skip


async def test_without_training_it_is_said(tmp_path: Path) -> None:
    async with (
        fine_tuning(tmp_path, training=False) as up,
        httpx2.AsyncClient(base_url=f"{up.url}/v1") as http,
    ):
        for path in ("/files", "/fine_tuning/jobs"):
            reply = await http.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (
                400, "training_disabled",
            )  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        ("", "ft-k"), ("My Bot!", "my-bot-k"), ("日本", "ft-k"), ("--a--", "a-k"), ("-", "ft-k"),
        ("x" * 64, "x" * 48 + "-k"), ("x" * 47 + "-y", "x" * 47 + "-k"),
    ],
)  # fmt: skip
async def test_every_suffix_gives_a_legal_name(suffix: str, name: str) -> None:
    assert adapter_name(suffix, "k") == name
    assert len(model_id("b" * 300, suffix, "k" * 8)) <= 230


async def test_the_multiplier_is_of_the_trainers_own_rate() -> None:
    assert OptimSpec().lr == BASE_RATE
