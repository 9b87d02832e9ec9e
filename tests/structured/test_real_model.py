"""The default model with structured output: valid answers, the same bits alone and in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import Output, SamplingParams, StepReport, Submit
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, build
from loraplex_server.text.tokenizer import TextTokenizer
from structured.corpus import accepted, validator
from structured.scribbler import structure

CACHE = Path("var/cache")
NAMES = (
    "tagged union",
    "person",
    "function call",
    "tree",
    "enum of words",
    "list of choices",
    "unicode keys",
    "number in a range",
    "pattern",
    "date and time",
    "empty schema",
    "exactly one of tagged references",
)


@pytest.fixture(scope="module")
def runner() -> LocalRunner:
    return build(
        RunnerConfig(
            model="default",
            dtype="bfloat16",
            device="cpu",
            threads=1,
            cache=str(CACHE),
            max_context=512,
            kv_tokens=8192,
            kv_memory=0,
            adapter_memory=1 << 20,
            max_rank=16,
        )
    )


@pytest.fixture(scope="module")
def tokenizer(runner: LocalRunner) -> TextTokenizer:
    return TextTokenizer(Path(runner.info.tokenizer_path), 512)


async def requests(tokenizer: TextTokenizer) -> dict[int, Submit]:
    """A conversation for each schema, and one without structured output."""
    found = {}
    ends = list(tokenizer.eos_token_ids)
    schemas = {entry["name"]: entry["schema"] for entry in accepted()}
    for id, name in enumerate(NAMES):
        text = json.dumps(schemas[name], ensure_ascii=False)
        asked = [{"role": "user", "content": f"Write JSON for this schema: {text[:400]}"}]
        prompt = await tokenizer.render_chat(asked)
        found[id] = Submit(
            id=id,
            token_ids=prompt.token_ids,
            max_new_tokens=80,
            sampling=SamplingParams(temperature=0.8 * (id % 2), top_p=0.95, seed=id),
            stop_token_ids=ends,
            structure=structure("json_schema", text, ends=ends),
        )
    free = await tokenizer.render_chat([{"role": "user", "content": "What is the moon?"}])
    found[99] = Submit(99, free.token_ids, 40, sampling=SamplingParams(temperature=0.0))
    return found


def answers(runner: LocalRunner, asked: list[Submit]) -> dict[int, list[Output]]:
    core, found = EngineCore(runner), {}
    for submit in asked:
        core.add(submit)
    while not core.idle:
        for message in core.step():
            for output in message.outputs if isinstance(message, StepReport) else ():
                found.setdefault(output.id, []).append(output)
    core.check()
    return found


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(tokenizer: TextTokenizer, outputs: list[Output]) -> str:
    detokenizer = tokenizer.detokenizer([])
    return "".join(map(detokenizer.push, tokens(outputs))) + detokenizer.finish()


async def test_answers_are_valid_and_the_same_alone_and_in_a_batch(
    runner: LocalRunner, tokenizer: TextTokenizer
) -> None:
    assert runner.sampler is not None, "the kernels are not built"
    asked = await requests(tokenizer)
    together = answers(runner, list(asked.values()))
    schemas: dict[str, Any] = {entry["name"]: entry["schema"] for entry in accepted()}
    stopped = 0
    for id, name in enumerate(NAMES):
        assert together[id][-1].error is None, name
        if together[id][-1].finish == "stop":
            stopped += 1
            validator(schemas[name]).validate(json.loads(text(tokenizer, together[id])))
    assert stopped >= len(NAMES) // 3
    for id in (0, 5, 99):
        alone = answers(runner, [asked[id]])
        assert tokens(alone[id]) == tokens(together[id])
        assert alone[id][-1].finish == together[id][-1].finish
