"""Structured output in requests: checks of its fields, and the form that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loraplex.v1 import generation_pb2

from loraplex_server.engine.parameters import Structure
from loraplex_server.forms.checker import FormChecker
from loraplex_server.forms.form import FormKind, StructureForm
from loraplex_server.rpc.calls.bounds import MAX_CHOICES

if TYPE_CHECKING:
    from loraplex_server.rpc.messages.validate import RequestChecks

FIELD: Final = "structured_output"
UNAVAILABLE: Final = (
    "is not available: the base model has no tokenizer that it needs, or the operator has turned "
    "it off"
)


def check(wire: generation_pb2.StructuredOutput, most_bytes: int, checks: RequestChecks) -> None:
    """Checks the fields of structured output; `most_bytes` is 0 if it is not served.

    What the texts say is checked later, by `forms`.
    """
    if not most_bytes:
        checks.add(FIELD, UNAVAILABLE)
        return
    match kind := wire.WhichOneof("form"):
        case None:
            checks.add(FIELD, "one of its fields must be set")
        case "json_object":
            checks.require(wire.json_object, f"{FIELD}.{kind}", "must be true if it is set")
        case "choices":
            _choices(wire.choices.texts, most_bytes, checks)
        case _:
            checks.size(f"{FIELD}.{kind}", getattr(wire, kind), most_bytes)


def _choices(texts: Sequence[str], most_bytes: int, checks: RequestChecks) -> None:
    field = f"{FIELD}.choices.texts"
    checks.require(bool(texts), field, "must not be empty")
    if not checks.at_most(field, texts, MAX_CHOICES):
        return
    for i, text in enumerate(texts):
        checks.require(bool(text), f"{field}[{i}]", "must not be empty")
    if sum(len(text.encode()) for text in texts) > most_bytes:
        checks.add(field, f"must be at most {most_bytes} bytes together")


async def ask(
    request: generation_pb2.GenerateRequest, forms: FormChecker, field_path: str
) -> Structure | None:
    """The structure that a valid request asks for, checked; None if it asks for none.

    Raises Refusal that names the field at fault.
    """
    if not request.HasField(FIELD):
        return None
    wire = request.structured_output
    form, field = _form_of(wire), f"{field_path}{FIELD}.{wire.WhichOneof('form')}"
    return Structure(await forms.grammar(form, field), form.is_json)


def _form_of(wire: generation_pb2.StructuredOutput) -> StructureForm:
    kind = FormKind(wire.WhichOneof("form") or "")
    if kind is FormKind.JSON_OBJECT:
        return StructureForm(kind, [])
    texts = wire.choices.texts if kind is FormKind.CHOICES else [getattr(wire, kind)]
    return StructureForm(kind, list(texts))
