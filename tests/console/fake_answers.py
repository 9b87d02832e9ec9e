"""Answers and states of the batch of the fake gateway.

Answers are short, but to a prompt that asks for a long story: these are as long as they may be.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from fake_adapters import BASE, Adapters, Refused
from starlette.responses import Response, StreamingResponse

Json = dict[str, Any]
SECONDS_PER_TOKEN = 0.02
WORDS = {
    "": "The Moon is Earth's only natural satellite. It orbits our planet once every 27 days, "
    "and its gravity raises the tides of the oceans.",
    "pirate": "Arr, the Moon be Earth's only natural satellite, matey! She sails round our world "
    "once every 27 days, and her pull be raisin' the tides o' the seven seas.",
    "json": '{"name": "Moon", "kind": "natural satellite", "orbits": "Earth", "period_days": 27}',
    "terse": "Earth's only natural satellite.",
}


class Running:
    """Counts the requests that run, by adapter."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.generated = 0
        self.prompts = 0


async def answer(body: Json, adapters: Adapters, running: Running, *, chat: bool) -> Response:
    """The stream of one answer."""
    mix = body.get("loraplex", {}).get("mix")
    if mix:
        found = [adapters.find(term["adapter"]) for term in mix]
    elif body["model"] == BASE:
        found = []
    else:
        found = [adapters.find(body["model"])]
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    if len(prompt) > 8000:
        raise Refused(
            400, "the prompt has 2311 tokens; the context is 2048", "context_length_exceeded"
        )
    headers = {"x-loraplex-adapter": ", ".join(f"{a['id']} {a['digest']}" for a in found)}
    name = found[0]["name"] if found else ""
    text = WORDS.get(name, WORDS[""])
    if "long story" in prompt:
        text = " ".join([text] * body["max_tokens"])
    source = _chunks(body, text, running, found, chat)
    return StreamingResponse(source, media_type="text/event-stream", headers=headers)


async def _chunks(
    body: Json, text: str, running: Running, found: list[Json], chat: bool
) -> AsyncIterator[str]:
    label = "+".join(adapter["id"] for adapter in found)
    order = random.Random(f"{body.get('seed')}{text}")
    running.rows[label] += 1
    running.prompts += 24
    try:
        await asyncio.sleep(0.08)
        tokens = _tokens(text, order)[: body["max_tokens"]]
        for token in tokens:
            await asyncio.sleep(SECONDS_PER_TOKEN)
            running.generated += 1
            yield _event(_chunk(body, token, order, chat))
        ended = {"index": 0, "finish_reason": "stop", "logprobs": None}
        yield _event({"choices": [{**ended, **({"delta": {}} if chat else {"text": ""})}]})
        usage = {"prompt_tokens": 24, "completion_tokens": len(tokens), "total_tokens": 24}
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    finally:
        running.rows[label] -= 1


def _tokens(text: str, order: random.Random) -> list[str]:
    """Pieces of a text, as a tokenizer might cut it."""
    pieces: list[str] = []
    for word in text.split(" "):
        piece = f" {word}" if pieces else word
        cut = order.randrange(2, 9)
        pieces += [piece[:cut], piece[cut:]] if len(piece) > 9 else [piece]
    return [piece for piece in pieces if piece]


def _chunk(body: Json, token: str, order: random.Random, chat: bool) -> Json:
    probability = min(0.999, order.random() ** 0.35)
    others = [
        (word, (1 - probability) / 2**at) for at, word in enumerate((" the", " a", " its"), 1)
    ]
    top = [(token, probability), *others]
    logprobs: Json | None = None
    if chat and body.get("logprobs"):
        listed = [_entry(text, p) for text, p in top]
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}]}
    elif not chat and body.get("logprobs"):
        logprobs = {
            "tokens": [token],
            "token_logprobs": [math.log(probability)],
            "top_logprobs": [{text: math.log(p) for text, p in top}],
            "text_offset": [0],
        }
    choice: Json = {"index": 0, "finish_reason": None, "logprobs": logprobs}
    return {"choices": [{**choice, **({"delta": {"content": token}} if chat else {"text": token})}]}


def _entry(text: str, probability: float) -> Json:
    return {"token": text, "logprob": math.log(probability), "bytes": list(text.encode())}


def watch(
    adapters: Adapters, running: Running, interval: float, loaded: Callable[[], bool]
) -> Response:
    """The stream of states."""

    async def states() -> AsyncIterator[str]:
        started = time.time()
        while True:
            state = _state(adapters, running, time.time() - started, loaded())
            yield _event(state)
            await asyncio.sleep(interval)

    return StreamingResponse(states(), media_type="text/event-stream")


def _state(adapters: Adapters, running: Running, elapsed: float, loaded: bool) -> Json:
    rows = Counter(running.rows)
    if loaded:
        for at, name in enumerate(["", "pirate@2", "json@1", "terse@1", "pirate@1+json@1"]):
            wave = 3 + 3 * math.sin(elapsed / (2 + at) + at)
            rows[name] += round(max(0.0, wave))
    device = sum(a["device_bytes"] + a["merged_bytes"] for a in adapters.all())
    total = sum(rows.values())
    entries = [
        {"adapter": name, "hidden": False, "prefill": 0, "decode": n, "waiting": n // 4}
        for name, n in rows.most_common()
        if n
    ]
    load = int(elapsed * 200) if loaded else 0
    return {
        "object": "engine.state",
        "time": time.time(),
        "steps": 1000 + int(elapsed * 40),
        "generated_tokens": running.generated + load,
        "prompt_tokens": running.prompts + load // 4,
        "adapters": entries,
        "kv_blocks_used": 9 * total,
        "kv_blocks": 512,
        "kv_blocks_cached": 40,
        "resident_adapters": sum(a["state"] == "resident" for a in adapters.all()),
        "adapter_bytes": device,
        "adapter_bytes_limit": 256_000_000,
        "max_rows": 32,
    }


def _event(value: Json) -> str:
    return f"data: {json.dumps(value)}\n\n"
