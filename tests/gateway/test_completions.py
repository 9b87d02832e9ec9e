"""Continued prompts over HTTP are the server's, with scores as evaluation suites read them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gateway.harness import BASE, Web, error_of, events_of, gateway
from loraplex import AsyncClient
from loraplex.results import TokenLogprob, TokenLogprobs
from loraplex_gateway.generation.logprobs import TextLogprobs, joined
from rpc.harness import Running, expected

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/completions"
IDS = [20, 21, 22, 30, 31]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Running, Web]]:
    async with gateway(tmp_path_factory.mktemp("completions")) as (up, web):
        await up.register("one", 1)
        yield up, web


@pytest.fixture
def up(both: tuple[Running, Web]) -> Running:
    return both[0]


@pytest.fixture
def web(both: tuple[Running, Web]) -> Web:
    return both[1]


async def direct(up: Running, prompt: str | None = None, **options: Any) -> Any:
    """The same request through the client of gRPC."""
    async with AsyncClient(str(up.server.address), key="") as client:
        return await client.generate(prompt, **{"temperature": 0.0, **options})


async def text_of(up: Running, tokens: list[int]) -> str:
    async with AsyncClient(str(up.server.address), key="") as client:
        return (await client.detokenize(tokens)).text


def body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "temperature": 0, **fields}


@pytest.mark.parametrize("model", [BASE, "one"])
async def test_a_text_is_continued_by_16_tokens_unless_told_otherwise(
    up: Running, web: Web, model: str
) -> None:
    adapter = None if model == BASE else model
    wanted = await direct(up, "the quick brown", adapter=adapter, max_new_tokens=16)
    found = await web.ok(PATH, body(model=model, prompt="the quick brown"))
    (choice,) = found["choices"]
    assert choice["text"] == wanted.text
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    assert found["usage"]["completion_tokens"] == 16
    assert found["usage"]["prompt_tokens"] == wanted.usage.prompt_tokens


async def test_prompts_of_every_form_are_the_same_prompt(up: Running, web: Web) -> None:
    text = await text_of(up, IDS)
    async with AsyncClient(str(up.server.address), key="") as client:
        ids = list((await client.tokenize(text)).token_ids)
    answers = [
        (await web.ok(PATH, body(prompt=prompt, max_tokens=5)))["choices"][0]["text"]
        for prompt in (text, [text], ids, [ids])
    ]
    assert len(set(answers)) == 1
    assert answers[0] == await text_of(up, expected(ids, 5))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_choice_of_a_prompt_and_a_completion_is_their_place(
    up: Running, web: Web, stream: bool
) -> None:
    prompts = ["the quick", "brown fox", "jumps over"]
    asked = body(prompt=prompts, max_tokens=4, n=2, seed=3, temperature=20)
    wanted = []
    for prompt in prompts:
        for i in range(2):
            alone = await direct(up, prompt, max_new_tokens=4, seed=3 + i, temperature=20.0)
            wanted.append(alone.text)
    if stream:
        options = {"include_usage": True}
        events = await web.events(PATH, {**asked, "stream_options": options})
        texts = [""] * 6
        reasons: list[Any] = [None] * 6
        for choice in (choice for each in events for choice in each["choices"]):
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        assert reasons == ["length"] * 6
        assert events[-1]["choices"] == []
        usage = events[-1]["usage"]
    else:
        found = await web.ok(PATH, asked)
        assert [choice["index"] for choice in found["choices"]] == list(range(6))
        texts = [choice["text"] for choice in found["choices"]]
        usage = found["usage"]
    assert texts == wanted
    assert usage["completion_tokens"] == 24
    alone = [await direct(up, prompt, max_new_tokens=1) for prompt in prompts]
    assert usage["prompt_tokens"] == sum(each.usage.prompt_tokens for each in alone)


async def test_many_prompts_are_answered_in_their_order(web: Web) -> None:
    prompts = [[20 + i, 21, 22] for i in range(150)]
    found = await web.ok(PATH, body(prompt=prompts, max_tokens=1, return_token_ids=True))
    got = [choice["token_ids"] for choice in found["choices"]]
    assert got == [expected(prompt, 1) for prompt in prompts]


async def test_the_error_of_one_prompt_is_that_of_the_request(web: Web) -> None:
    long = [[20] * 300]
    error = await web.refused(PATH, body(prompt=[IDS, *long]), 400)
    assert error["code"] == "context_length_exceeded"
    answer = await web.post(PATH, body(prompt=[*long, IDS], stream=True))
    error = error_of(answer) if answer.status_code == 400 else events_of(answer.text)[-1]["error"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["the quick brown fox", IDS])
async def test_an_echoed_prompt_comes_first_with_its_scores(
    up: Running, web: Web, prompt: Any, stream: bool
) -> None:
    given = {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": prompt}
    wanted = await direct(
        up, **given, max_new_tokens=4, logprobs=2, prompt_logprobs=2, return_prompt_token_ids=True
    )
    text = prompt if isinstance(prompt, str) else await text_of(up, prompt)
    asked = body(prompt=prompt, max_tokens=4, echo=True, logprobs=2)
    if stream:
        events = await web.events(PATH, asked)
        choices = [each["choices"][0] for each in events]
        whole = "".join(choice["text"] for choice in choices)
        scored = joined([choice["logprobs"] for choice in choices if choice["logprobs"]])
    else:
        (choice,) = (await web.ok(PATH, asked))["choices"]
        whole, scored = choice["text"], choice["logprobs"]
    assert whole == text + wanted.text
    entries = [*wanted.prompt_logprobs, *wanted.logprobs]
    assert scored["token_logprobs"] == [None, *(each.chosen.logprob for each in entries)]
    assert scored["top_logprobs"][0] is None
    assert scored["tokens"][0] == await text_of(up, [wanted.prompt_token_ids[0]])
    assert scored["tokens"][1:] == [each.chosen.text for each in entries]
    assert scored["text_offset"][0] == 0
    assert scored["text_offset"] == sorted(scored["text_offset"])
    for token, offset in zip(scored["tokens"], scored["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert whole[offset : offset + len(token)] == token
    assert len(scored["tokens"]) == len(wanted.prompt_token_ids) + 4


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_log_likelihoods_are_read_as_evaluation_suites_read_them(
    up: Running, web: Web, max_tokens: int
) -> None:
    """As lm-eval's `local-completions`: scores, and whether each token was the likeliest."""
    context = [20, 21, 22]
    greedy = expected(context, 3)
    other = [greedy[0], (greedy[1] + 1) % 300 + 40, 50]
    prompts = [[*context, *greedy], [*context, *other]]
    asked = body(prompt=prompts, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True)
    found = await web.ok(PATH, asked)
    verdicts = []
    for choice, prompt in zip(
        sorted(found["choices"], key=lambda each: each["index"]), prompts, strict=True
    ):
        scored = choice["logprobs"]
        end = len(prompt)
        assert len(scored["tokens"]) == end + max_tokens
        values = scored["token_logprobs"][len(context) : end]
        tops = scored["top_logprobs"][len(context) : end]
        assert all(isinstance(value, float) for value in values)
        verdicts.append(
            all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        )
        wanted = await direct(
            up, token_ids=prompt, max_new_tokens=max_tokens, prompt_logprobs=1, logprobs=1
        )
        tail = wanted.prompt_logprobs[len(context) - 1 :]
        assert values == [each.chosen.logprob for each in tail]
    assert verdicts == [True, False]


async def test_a_scored_prompt_is_whole_where_the_model_would_end(up: Running, web: Web) -> None:
    """Suites leave out the last value, which must not be one of the prompt's."""
    prompt = [20, 21, 22]
    one = {"token_ids": prompt, "max_new_tokens": 1}
    (end,) = (await direct(up, adapter="one", **one)).token_ids
    await up.register("ends", 1, eos_token_ids=[end])
    assert (await direct(up, adapter="ends", **one)).token_ids == ()
    asked = body(model="ends", prompt=prompt, max_tokens=1, logprobs=1, echo=True)
    for stream in (False, True):
        if stream:
            told = await web.post(PATH, {**asked, "stream": True})
            choices = [each["choices"][0] for each in events_of(told.text)]
        else:
            choices = (await web.ok(PATH, asked))["choices"]
        scores = [each["logprobs"]["token_logprobs"] for each in choices if each["logprobs"]]
        values = [value for part in scores for value in part]
        assert len(values) == len(prompt) + 1
        assert values[0] is None
        assert all(isinstance(value, float) for value in values[1:])


async def test_a_prompt_of_one_token_is_scored_too(web: Web) -> None:
    found = await web.ok(PATH, body(prompt=[20], max_tokens=0, echo=True, logprobs=0))
    (choice,) = found["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None]
    assert choice["logprobs"]["top_logprobs"] == [None]
    assert choice["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 0


async def test_an_echo_without_scores_is_the_prompt(up: Running, web: Web) -> None:
    for prompt in ("déjà vu 😀", IDS):
        text = prompt if isinstance(prompt, str) else await text_of(up, prompt)
        found = await web.ok(PATH, body(prompt=prompt, max_tokens=2, echo=True))
        assert found["choices"][0]["text"].startswith(text)
        assert found["choices"][0]["logprobs"] is None
        found = await web.ok(PATH, body(prompt=prompt, max_tokens=0, echo=True))
        assert found["choices"][0]["text"] == text


async def test_a_text_can_be_tokenised_without_the_token_that_begins_a_prompt(web: Web) -> None:
    asked = body(prompt="the quick", max_tokens=1, return_token_ids=True)
    plain = await web.ok(PATH, {**asked, "add_special_tokens": False})
    tokens = await web.ok("/tokenize", {"prompt": "the quick", "add_special_tokens": False})
    assert plain["choices"][0]["prompt_token_ids"] == tokens["tokens"]


async def test_the_scores_of_a_prompt_are_shown_by_token(up: Running, web: Web) -> None:
    wanted = await direct(up, token_ids=IDS, max_new_tokens=1, prompt_logprobs=2)
    found = await web.ok(PATH, body(prompt=IDS, max_tokens=1, prompt_logprobs=2))
    shown = found["choices"][0]["prompt_logprobs"]
    assert shown[0] is None
    for position, entry in zip(shown[1:], wanted.prompt_logprobs, strict=True):
        assert position[str(entry.chosen.token_id)]["logprob"] == entry.chosen.logprob
        for rank, top in enumerate(entry.top, 1):
            assert position[str(top.token_id)] == {
                "logprob": top.logprob,
                "rank": rank,
                "decoded_token": top.text,
            }


def scored(text: str, value: float, raw: bytes = b"", *top: tuple[str, float]) -> TokenLogprobs:
    entries = tuple(TokenLogprob(i, v, t) for i, (t, v) in enumerate(top))
    return TokenLogprobs(TokenLogprob(99, value, text, raw or text.encode()), entries)


async def test_of_two_tokens_with_one_text_the_likelier_is_shown() -> None:
    part = TextLogprobs().of(
        [
            scored("a", -3.0, b"a", ("a", -1.0), ("b", -2.0)),
            scored("a", -0.5, b"a", ("a", -0.5), ("a", -4.0)),
            scored("c", float("-inf"), b"c", ("b", -0.1)),
        ]
    )
    assert part["top_logprobs"] == [
        {"a": -1.0, "b": -2.0},
        {"a": -0.5},
        {"b": -0.1, "c": -9999.0},
    ]
    assert part["token_logprobs"] == [-3.0, -0.5, -9999.0]


async def test_tokens_that_make_one_character_have_its_offset() -> None:
    face = "😀".encode()
    scores = TextLogprobs()
    first = scores.unscored("<s>", is_shown=False)
    rest = scores.of(
        [
            scored("é", -1.0),
            scored("\ufffd", -1.0, face[:1]),
            scored("\ufffd", -1.0, face[1:3]),
            scored("\ufffd", -1.0, face[3:]),
            scored("ab", -1.0),
            scored("\ufffd", -1.0, b"\xff"),
            scored("c", -1.0),
            scored("\ufffd", -1.0, face[:2]),
            scored("d", -1.0),
        ]
    )
    assert first["text_offset"] == [0]
    assert rest["text_offset"] == [0, 1, 1, 1, 2, 4, 5, 6, 7]
