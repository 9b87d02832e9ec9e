"""Files and training jobs of the fake gateway: an epoch takes about a second and a half."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from fake_adapters import Adapters, Handler, Refused
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

Json = dict[str, Any]
STEPS_PER_EPOCH = 20
STEPS_PER_SECOND = 14
EVERY = 10
PROMPTS = ("What is the moon?", "Where is the treasure?")


class Jobs:
    """Files and jobs by their ids."""

    def __init__(self, adapters: Adapters) -> None:
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, Json] = {}
        self._adapters = adapters

    def create(self, body: Json) -> Json:
        """A new job, which runs by the clock."""
        if body["training_file"] not in self.files:
            raise Refused(404, "no such file", "file_not_found")
        number = f"ftjob-{len(self.jobs) + 1:06d}"
        self.jobs[number] = {
            "id": number,
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "started": time.time() + 0.3,
            "finished_at": None,
            "model": body["model"],
            "fine_tuned_model": None,
            "user_provided_suffix": body.get("suffix"),
            "status": "queued",
            "steps": _epochs(body) * STEPS_PER_EPOCH,
            "method": body.get("method"),
            "trained_tokens": None,
            "estimated_finish": None,
            "error": None,
        }
        return self.present(number)

    def step(self, job: Json) -> int:
        """Steps done by now."""
        end = job["finished_at"] or time.time()
        return max(0, min(job["steps"], int((end - job["started"]) * STEPS_PER_SECOND)))

    def present(self, number: str) -> Json:
        """The job as it is now."""
        if number not in self.jobs:
            raise Refused(404, f"{number} is not a job", "job_not_found")
        job = self.jobs[number]
        if job["status"] in ("queued", "running"):
            step = self.step(job)
            job["status"] = "running" if step else "queued"
            job["trained_tokens"] = 512 * step
            if step == job["steps"]:
                adapter = self._adapters.add(job["user_provided_suffix"], 8, 921_600, {})
                job |= {"status": "succeeded", "fine_tuned_model": adapter["name"]}
                job["finished_at"] = int(time.time())
        return job

    def events(self, number: str) -> list[Json]:
        """The events until now, the newest first."""
        job = self.present(number)
        steps: int = job["steps"]
        done = steps if job["status"] == "succeeded" else self.step(job)
        found = [_event(job, "start", "message", "The job is created.", {})]
        found.append(_event(job, "samples-0", "message", "Answers after step 0", _samples(0)))
        for step in range(1, done + 1):
            loss = 0.6 + 2.2 * math.exp(-step / 14) + 0.06 * math.sin(3 * step)
            data: Json = {
                "step": step, "total_steps": steps, "train_loss": loss,
                "learning_rate": 2e-4 * (1 - step / steps),
            }  # fmt: skip
            if step % EVERY == 0:
                data["valid_loss"] = loss + 0.12
            found.append(_event(job, str(step), "metrics", f"Step {step}: loss {loss:.3f}", data))
        if done == steps:
            found.append(
                _event(job, "samples", "message", f"Answers after step {steps}", _samples(steps))
            )
            found.append(_event(job, "end", "message", "The adapter is registered.", {}))
        return found[::-1]


def handlers(adapters: Adapters) -> list[tuple[str, str, Handler]]:
    """Methods, paths and handlers."""
    jobs = Jobs(adapters)

    async def upload(request: Request) -> Response:
        form = await request.form()
        file: Any = form["file"]
        data = await file.read()
        number = f"file-{len(jobs.files) + 1:06d}"
        jobs.files[number] = data
        described = {"id": number, "object": "file", "bytes": len(data), "filename": file.filename}
        return JSONResponse({**described, "created_at": int(time.time()), "purpose": "fine-tune"})

    async def create(request: Request) -> Response:
        body = await request.json()
        for line in jobs.files.get(body["training_file"], b"").splitlines():
            json.loads(line)
        return JSONResponse(jobs.create(body))

    async def listed(_: Request) -> Response:
        found = [jobs.present(number) for number in reversed(jobs.jobs)]
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def one(request: Request) -> Response:
        return JSONResponse(jobs.present(request.path_params["job"]))

    async def cancel(request: Request) -> Response:
        job = jobs.present(request.path_params["job"])
        job |= {"status": "cancelled", "finished_at": int(time.time())}
        return JSONResponse(job)

    async def events(request: Request) -> Response:
        found = jobs.events(request.path_params["job"])
        after, limit = request.query_params.get("after"), int(request.query_params["limit"])
        first = next((at + 1 for at, event in enumerate(found) if event["id"] == after), 0)
        page = found[first : first + limit]
        more = len(found) > first + limit
        return JSONResponse({"object": "list", "data": page, "has_more": more})

    path = "/v1/fine_tuning/jobs"
    return [
        ("POST", "/v1/files", upload),
        ("POST", path, create),
        ("GET", path, listed),
        ("GET", path + "/{job}", one),
        ("POST", path + "/{job}/cancel", cancel),
        ("GET", path + "/{job}/events", events),
    ]


def _event(job: Json, name: str, kind: str, message: str, data: Json) -> Json:
    return {
        "id": f"ftevent-{job['id']}-{name}",
        "object": "fine_tuning.job.event",
        "created_at": int(time.time()),
        "level": "info",
        "type": kind,
        "message": message,
        "data": data,
    }


def _epochs(body: Json) -> int:
    return int(body["method"]["supervised"]["hyperparameters"]["n_epochs"])


def _samples(step: int) -> Json:
    answers = (
        ("Arr, she be", "X marks the spot, matey.") if step else ("The moon is", "I do not know.")
    )
    expected = ("Arr, she be the lantern o' the night.", "X marks the spot.")
    return {
        "step": step,
        "samples": [
            {"prompt": prompt, "answer": answer, "expected": wanted}
            for prompt, answer, wanted in zip(PROMPTS, answers, expected, strict=True)
        ],
    }
