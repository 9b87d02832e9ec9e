"""Structured output in the engine: valid answers, and nothing else changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner
from loraplex_model.decoder.sampling import NativeSampling
from loraplex_model.ops import build
from loraplex_server.engine.messages import SamplingParams, Structure
from loraplex_server.engine.runner.sampling import NativeSampler
from loraplex_server.engine.structures.constraint import Constraint
from loraplex_server.engine.structures.structures import Structures
from rpc.harness import EOS, VOCAB
from structured.scribbler import Scribbler, seeded, structure, text_of, words

pytestmark = pytest.mark.usefixtures("pace")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(params=["lock-step", "ahead"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engines of a test compute pass after pass, or launch one pass ahead."""
    monkeypatch.setattr(Engine, "is_ahead", request.param == "ahead")
    return str(request.param)


def person(**fields: Any) -> Structure:
    return structure("json_schema", json.dumps(PERSON), **fields)


class Asking(Engine):
    """An engine whose requests stop at the end tokens of their structures, as the front asks."""

    def submit(self, id: int, token_ids: list[int], max_new_tokens: int = 4, **fields: Any) -> None:
        if (given := fields.get("structure")) is not None:
            fields.setdefault("stop_token_ids", given.end_token_ids)
        super().submit(id, token_ids, max_new_tokens, **fields)


def engine(folder: Path, limits: dict[str, int] | None = None, **options: Any) -> Engine:
    return Asking(Scribbler(folder, **options), **(limits or {}))


def fits(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


def test_an_answer_that_stops_fits_its_schema_whatever_is_sampled(tmp_path: Path) -> None:
    one = engine(tmp_path)
    for seed in range(24):
        params = seeded(seed, top_k=[0, 1, 40][seed % 3], top_p=[1.0, 0.9][seed % 2])
        one.submit(seed, [3 + seed, 4], 200, sampling=params, structure=person())
    one.submit(98, [3], 200, sampling=SamplingParams(temperature=0.0), structure=person())
    penalised = seeded(1, repetition_penalty=1e-30, logit_bias={5: 100.0, EOS: 100.0})
    one.submit(99, [5, 5, 5], 200, sampling=penalised, structure=person())
    one.run()
    outcomes = {id: one.outcome(id) for id in [*range(24), 98, 99]}
    assert set(outcomes.values()) <= {"stop", "length"}
    stopped = [id for id, outcome in outcomes.items() if outcome == "stop"]
    assert len(stopped) > 15
    assert all(fits(text_of(one, id)) for id in stopped)


def test_tokens_do_not_depend_on_the_batch_nor_on_how_it_is_computed(
    tmp_path: Path, pace: str
) -> None:
    """Alone; with others and adapters, chunks of prompts, few blocks, and with the kernels."""

    def submit(one: Engine, id: int) -> None:
        one.submit(
            id,
            [3 + id] * (9 + 5 * id),
            40,
            sampling=seeded(id, top_p=0.95, presence_penalty=0.5),
            structure=person() if id % 3 else structure("regex", "[a-z ]{8,30}"),
            adapters=[adapter(f"a{id % 2}")] if id % 2 else [],
        )

    alone = {}
    for id in range(1, 7):
        one = engine(tmp_path)
        submit(one, id)
        one.run()
        alone[id] = one.tokens(id), one.outcome(id)
    crowded = [
        engine(tmp_path, {"token_budget": 7, "max_running": 7}),
        engine(tmp_path, num_blocks=34),
        engine(tmp_path),
    ]
    if pace == "lock-step":
        try:
            crowded[2].runner.sampler = NativeSampler(NativeSampling(build.load(), 1))
        except build.KernelsUnavailable:
            crowded.pop()
    for one in crowded:
        for id in range(1, 7):
            submit(one, id)
            one.submit(100 + id, [id + 20], 30, sampling=seeded(id))
            one.step()
        one.run(3000)
        assert {id: (one.tokens(id), one.outcome(id)) for id in alone} == alone
    assert crowded[1].core._scheduler.preemptions > 0


def test_others_get_the_tokens_that_they_get_alone(tmp_path: Path) -> None:
    def run(structured: int) -> dict[int, list[int]]:
        one = engine(tmp_path)
        for id in range(5):
            one.submit(id, [7 + id], 25, sampling=seeded(id, temperature=0.0 if id else 1.0))
        for id in range(100, 100 + structured):
            one.submit(id, [7], 25, sampling=seeded(id), structure=person())
        one.run()
        return {id: one.tokens(id) for id in range(5)}

    assert run(0) == run(6)


def test_a_complete_text_stops_at_once_and_without_an_end_token(tmp_path: Path) -> None:
    one = engine(tmp_path)
    one.submit(1, [3], 200, structure=structure("choices", "the end", "the quick brown fox"))
    one.submit(2, [3], 200, structure=structure("choices", "the end", ends=()))
    one.submit(3, [3], 4, structure=structure("regex", "the", ends=()), logprobs=1)
    one.run()
    for id in (1, 2, 3):
        assert one.outcome(id) == "stop"
        assert one.outputs[id][-1].stop_token is None
        assert EOS not in one.tokens(id)
    assert text_of(one, 1) in ("the end", "the quick brown fox")
    assert text_of(one, 2) == "the end"
    scores = [entry for output in one.outputs[3] for entry in output.logprobs]
    assert [entry.token_id for entry in scores] == one.tokens(3)


def test_the_end_token_is_chosen_only_where_the_text_is_complete(tmp_path: Path) -> None:
    """With every end token as likely as can be: the model's, an adapter's, and one of letters."""
    letter = words().token_to_id("a")
    one = engine(tmp_path)
    biased = seeded(1, logit_bias={EOS: 100.0, 0: 100.0, letter: 100.0})
    ends = (0, letter)
    one.submit(1, [3], 60, sampling=biased, structure=structure("regex", "[a-c]{4,8}", ends=ends))
    one.run()
    assert one.outcome(1) == "stop"
    assert one.outputs[1][-1].stop_token in ends
    text = text_of(one, 1)
    assert len(text) == 4
    assert set(text) <= {"b", "c"}  # the adapter's end token is never a part of the text


def test_without_end_tokens_the_text_goes_on_as_long_as_it_can(tmp_path: Path) -> None:
    one = engine(tmp_path)
    bias = seeded(logit_bias={EOS: 100.0})
    one.submit(1, [3], 200, sampling=bias, structure=structure("regex", "[a-c]{4,8}", ends=()))
    one.submit(2, [3], 20, sampling=bias, structure=structure("regex", "[a-c]+", ends=()))
    one.run()
    assert one.outcome(1) == "stop"
    assert len(text_of(one, 1)) == 8
    assert one.outcome(2) == "length"
    assert len(one.tokens(2)) == 20


def test_the_last_token_may_complete_the_text(tmp_path: Path) -> None:
    """With exactly as many tokens as the text has, it stops; with one less, it is cut off."""
    for most, outcome in ((2, "stop"), (1, "length")):
        one = engine(tmp_path)
        one.submit(1, [3], most, structure=structure("regex", "[0-9][0-9]"))
        one.run()
        assert (one.outcome(1), len(one.tokens(1))) == (outcome, most)


def test_a_number_ends_although_the_model_repeats_a_digit(tmp_path: Path) -> None:
    """The empty schema, and a text whose digits are within a string."""
    digits = {words().token_to_id(digit): 60.0 for digit in "0123456789"}
    quote, nine = (words().token_to_id(each) for each in '"9')
    one = engine(tmp_path)
    any_value, text = structure("json_schema", "{}"), '{"type": "string", "minLength": 100}'
    one.submit(1, [3], 300, sampling=seeded(logit_bias=digits), structure=any_value)
    nines = seeded(logit_bias={nine: 60.0, quote: -60.0})
    one.submit(2, [3], 300, sampling=nines, structure=structure("json_schema", text))
    one.run()
    assert one.outcome(1) == "stop"
    assert isinstance(json.loads(text_of(one, 1)), int | float)
    assert len(text_of(one, 1)) < 150
    assert text_of(one, 2).startswith('"' + "9" * 100)


def test_log_probabilities_are_those_of_the_model_before_the_mask(tmp_path: Path) -> None:
    one, free = engine(tmp_path), engine(tmp_path)
    one.submit(1, [3, 4], 1, structure=structure("choices", "z"), logprobs=20)
    free.submit(1, [3, 4], 1, logprobs=20)
    one.run()
    free.run()
    (masked,), (plain,) = (each.outputs[1][0].logprobs for each in (one, free))
    assert masked.top == plain.top
    assert masked.token_id != plain.token_id
    assert masked.logprob < plain.logprob


def test_a_row_whose_grammar_needs_too_much_work_fails_alone(tmp_path: Path) -> None:
    hostile = 'start: a\na: a a | "x" | a a a a | ""'
    one = engine(tmp_path)
    one.submit(1, [3], 400, structure=structure("grammar", hostile, ends=()))
    one.submit(2, [3], 60, sampling=seeded(), structure=person())
    one.submit(3, [3], 30)
    one.run(2000)
    assert one.outcome(1) == "STRUCTURE_FAILED"
    assert one.outcome(2) in ("stop", "length")
    assert one.outcome(3) == "length"


@pytest.mark.parametrize("where", ["start", "refill", "advance"])
def test_a_fault_of_the_library_ends_its_row_only(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Panic(BaseException):
        """As the library's panics: no `Exception`."""

    class Broken:
        def __init__(self, matcher: Any) -> None:
            self._matcher = matcher
            self._masks = 0

        def __getattr__(self, name: str) -> Any:
            if name == "consume_token" and where == "advance":
                raise Panic("a secret of the schema")
            if name == "unsafe_compute_mask_ptr":
                self._masks += 1
                if self._masks == 2 and where == "refill":
                    raise Panic("a secret of the schema")
            return getattr(self._matcher, name)

    made = Structures._matcher

    def broken(self: Structures, given: Structure) -> Any:
        if "broken" not in given.grammar:
            return made(self, given)
        if where == "start":
            raise Panic("a secret of the schema")
        return Broken(made(self, given))

    monkeypatch.setattr(Structures, "_matcher", broken)
    one = engine(tmp_path)
    one.submit(1, [3], 60, structure=structure("choices", "broken broken broken"))
    one.submit(2, [3], 60, structure=structure("choices", "whole whole"))
    one.submit(3, [3], 20)
    one.run()
    assert one.outcome(1) == "STRUCTURE_FAILED"
    assert (one.outcome(2), one.outcome(3)) == ("stop", "length")
    assert "secret" not in caplog.text


class Gate:
    """Lets masks be computed only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        fill = Constraint._fill

        def late(constraint: Constraint, matcher: Any) -> None:
            self._open.wait(60)
            fill(constraint, matcher)

        monkeypatch.setattr(Constraint, "_fill", late)
        monkeypatch.setattr("loraplex_server.engine.passes.masks.PATIENCE", 0.001)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


def test_others_go_on_while_a_mask_is_late(tmp_path: Path, gate: Gate) -> None:
    one, alone = engine(tmp_path), engine(tmp_path)
    one.submit(1, [3], 20, sampling=seeded(), structure=structure("regex", "[a-z]{20}"))
    one.submit(2, [5], 12)
    for _ in range(20):
        one.step()
    assert one.outcome(2) == "length"
    assert one.tokens(1) == []
    one.core.check_books()
    gate.open()
    one.run()
    alone.submit(1, [3], 20, sampling=seeded(), structure=structure("regex", "[a-z]{20}"))
    alone.run()
    assert one.tokens(1) == alone.tokens(1) != []


def test_a_request_whose_mask_is_late_can_be_aborted_and_preempted(
    tmp_path: Path, gate: Gate
) -> None:
    one = engine(tmp_path, num_blocks=12)
    for id in (1, 2, 3):
        one.submit(id, [3 + id] * 8, 12, sampling=seeded(id), structure=person())
    for _ in range(4):
        one.step()
    one.core.abort(1)
    one.submit(4, [9] * 8, 16)
    for _ in range(25):
        one.step()
    one.core.check_books()
    gate.open()
    one.run()
    one.core.check()
    assert one.outcome(1) is None
    assert one.outcome(4) == "length"
    assert {one.outcome(2), one.outcome(3)} <= {"stop", "length"}


def test_requests_with_one_grammar_do_not_share_their_texts(tmp_path: Path) -> None:
    """Samples of one prompt and one structure, begun at different times."""
    one = engine(tmp_path)
    for id in range(12):
        one.submit(id, [3], 120, sampling=seeded(id), structure=person())
        one.step()
    one.run()
    texts = [text_of(one, id) for id in range(12)]
    assert len(set(texts)) == 12
    assert all(fits(text) for id, text in enumerate(texts) if one.outcome(id) == "stop")
    assert sum(one.outcome(id) == "stop" for id in range(12)) > 6


def test_an_unconstrained_engine_never_reads_the_tokenizer(tmp_path: Path) -> None:
    one = Engine(OracleRunner(vocab_size=VOCAB, tokenizer_path=str(tmp_path / "nowhere")))
    one.submit(1, [3], 5)
    one.run()
    assert one.outcome(1) == "length"
    one.submit(2, [3], 5, structure=structure("regex", "a"))
    one.run()
    assert one.outcome(2) == "STRUCTURE_FAILED"


def test_masks_are_timed(tmp_path: Path) -> None:
    one = engine(tmp_path)
    one.submit(1, [3], 6, structure=structure("regex", "[a-z]{20}"))
    seconds: list[float] = []
    while not one.core.idle:
        report = one.step()
        seconds += report.stats.mask_seconds if report is not None else []
    assert len(seconds) == 6
    assert all(0 < each < 60 for each in seconds)
