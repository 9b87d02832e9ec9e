"""What openai's package promises its users, asked of a gateway: python openai.py URL"""

import json
import sys

import openai
from openai import OpenAI
from pydantic import BaseModel

URL = sys.argv[1]
client = OpenAI(base_url=URL, api_key="x", max_retries=0)
ASK = [{"role": "user", "content": "What is Python?"}]


def expect(condition: object, what: str) -> None:
    if not condition:
        raise SystemExit(f"failed: {what}")


models = {model.id: model for model in client.models.list()}
expect("pirate" in models, "the adapter is listed")
expect(client.models.retrieve("pirate").id == "pirate", "the adapter is retrieved")

settings = {"max_tokens": 16, "temperature": 0, "seed": 1}
whole = client.chat.completions.create(model="pirate", messages=ASK, **settings)
text = whole.choices[0].message.content
expect(whole.choices[0].finish_reason in ("length", "stop"), "it says why it ended")
expect(whole.usage.completion_tokens <= 16, "usage counts")

parts = list(
    client.chat.completions.create(
        model="pirate",
        messages=ASK,
        stream=True,
        stream_options={"include_usage": True},
        **settings,
    )
)
joined = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
expect(joined == text, "a stream has the text of a whole answer")
expect(
    parts[-1].usage == whole.usage or parts[-1].usage.total_tokens == whole.usage.total_tokens,
    "usage",
)
expect(len({p.id for p in parts}) == 1, "one id in a stream")

several = client.chat.completions.create(
    model="pirate", messages=ASK, n=3, temperature=1, seed=5, max_tokens=8
)
expect([c.index for c in several.choices] == [0, 1, 2], "three choices")
again = client.chat.completions.create(
    model="pirate", messages=ASK, n=3, temperature=1, seed=5, max_tokens=8
)
expect(
    [c.message.content for c in several.choices] == [c.message.content for c in again.choices],
    "a seed repeats",
)

scored = client.chat.completions.create(
    model="pirate", messages=ASK, logprobs=True, top_logprobs=2, max_tokens=4, temperature=0
)
entries = scored.choices[0].logprobs.content
expect(len(entries) == 4 and all(len(e.top_logprobs) == 2 for e in entries), "log-probabilities")
expect(all(e.logprob == max(t.logprob for t in e.top_logprobs) for e in entries), "greedy is best")
expect(
    bytes(b for e in entries for b in e.bytes).decode() == scored.choices[0].message.content,
    "bytes",
)

echo = client.completions.create(
    model="pirate",
    prompt=["The sea is", "A ship"],
    echo=True,
    logprobs=1,
    max_tokens=1,
    temperature=0,
)
expect([c.index for c in echo.choices] == [0, 1], "a choice for each prompt")
first = echo.choices[0]
expect(first.text.startswith("The sea is"), "echo")
expect(first.logprobs.token_logprobs[0] is None, "the first token has no log-probability")
expect("".join(first.logprobs.tokens) == first.text, "tokens join to the text")
stopped = client.completions.create(
    model="pirate", prompt="1 2 3 4", stop=[" 7", "8"], max_tokens=32, temperature=0
)
expect(" 7" not in stopped.choices[0].text, "a stop string is not returned")


class City(BaseModel):
    name: str
    country: str


parsed = client.chat.completions.parse(
    model="default",
    messages=[{"role": "user", "content": "Name a city and its country, shortly."}],
    response_format=City,
    max_tokens=96,
    temperature=0,
)
if parsed.choices[0].finish_reason == "stop":
    expect(isinstance(parsed.choices[0].message.parsed, City), "an answer of a schema is parsed")

for wrong, kind, code in (
    ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
    ({"temperature": 1000}, openai.BadRequestError, None),
    ({"logit_processors": ["x"]}, openai.BadRequestError, None),
):
    body = {"model": "pirate", "messages": ASK, "max_tokens": 1, **wrong}
    try:
        client.post("/chat/completions", body=body, cast_to=object)
    except kind as error:
        expect(code is None or error.code == code, f"{wrong} has the code {code}, not {error.code}")
        expect(error.param == next(iter(wrong)), f"{wrong} names its field, not {error.param}")
    else:
        raise SystemExit(f"failed: {wrong} is not refused")

answer = client.responses.create(model="pirate", input="What is Python?", max_output_tokens=16)
expect(answer.output_text, "a response has text")
vector = client.embeddings.create(model="pirate", input=["the sea", "a ship"]).data
expect(len(vector) == 2 and len(vector[0].embedding) == len(vector[1].embedding) > 1, "embeddings")
print(json.dumps({"openai": openai.__version__, "ok": True}))
