"""A request for a fine-tuning job: read, checked, and turned into the server's terms."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from loraplex import TrainingOptions

from loraplex_gateway.errors import ApiError
from loraplex_gateway.finetuning.names import MAX_SUFFIX

BASE_RATE: Final = 2e-4
"""The trainer's learning rate for LoRA, which `learning_rate_multiplier` multiplies."""

AUTO: Final = "auto"

_FIXED: Final = frozenset({"labels", "alias", "replace", "checkpoints"})
"""Options of a job that requests over HTTP do not set."""

PARAMS: Final = {
    "data.data_id": "training_file",
    "data": "training_file",
    "eval_data.data_id": "validation_file",
    "eval_data": "validation_file",
    "spec.name": "suffix",
    "spec.seed": "seed",
    "spec.epochs": "hyperparameters.n_epochs",
    "spec.batch_size": "hyperparameters.batch_size",
    "spec.optimiser.learning_rate": "hyperparameters.learning_rate_multiplier",
    "delivery.labels": "metadata",
    "spec.method": "loraplex",
    "spec.optimiser": "loraplex",
    "spec": "loraplex",
    "delivery": "loraplex",
    "request_id": "idempotency-key",
}
"""Fields of the HTTP request by those of the server's, the most exact ones first."""


class Hyperparameters(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers of a supervised job; "auto" is the trainer's default."""

    n_epochs: float | str = AUTO
    batch_size: int | str = AUTO
    learning_rate_multiplier: float | str = AUTO


class Supervised(msgspec.Struct, forbid_unknown_fields=True):
    """The method of training on answers."""

    hyperparameters: Hyperparameters | None = None


class FineTuningMethod(msgspec.Struct):
    """A method by name, with its options."""

    type: str
    supervised: Supervised | None = None


class FineTuningOrder(msgspec.Struct):
    """The body of a request for a job; `loraplex` holds options of the server's own."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str = ""
    seed: int | None = None
    method: FineTuningMethod | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[Any] = []
    metadata: dict[str, str] = {}
    loraplex: dict[str, Any] = {}

    def require_supported(self) -> None:
        """Raises ApiError (400) for what is not done here, by name."""
        if self.method is not None and self.method.type != "supervised":
            kind = self.method.type[:50]
            raise _refused("method.type", f"{kind!r} is not supported here, only 'supervised'")
        if self.integrations:
            text = "are not supported here; the server's metrics and a job's events have the curves"
            raise _refused("integrations", text)
        if len(self.suffix) > MAX_SUFFIX or not self.suffix.isprintable():
            text = f"must have at most {MAX_SUFFIX} characters, all of them printable"
            raise _refused("suffix", text)
        if self.seed is not None and self.seed < 0:
            raise _refused("seed", "must not be negative")

    def options(self) -> TrainingOptions:
        """The job's options for the server. Raises ApiError (400)."""
        known = TrainingOptions.__annotations__.keys() - _FIXED
        for key in self.loraplex.keys() - known:
            raise _refused(f"loraplex.{key}", f"is none of {', '.join(sorted(known))}")
        given = self.chosen
        rate = _number("learning_rate_multiplier", given.learning_rate_multiplier)
        batch = _number("batch_size", given.batch_size)
        found: dict[str, Any] = {
            "epochs": _number("n_epochs", given.n_epochs),
            "batch_size": None if batch is None else int(batch),
            "learning_rate": None if rate is None else rate * BASE_RATE,
            "seed": self.seed,
        }
        own = {key: value for key, value in found.items() if value is not None}
        return TrainingOptions(**{**own, **self.loraplex})  # type: ignore[typeddict-item]

    @property
    def params(self) -> dict[str, str]:
        """Fields of the client's and of the server's request, and those of this one that set them.

        An option of `loraplex` comes before the field that usually sets it.
        """
        own = {key: f"loraplex.{key}" for key in TrainingOptions.__annotations__}
        named = {
            field.rpartition(".")[2]: param
            for field, param in PARAMS.items()
            if field.startswith("spec.")
        }
        given = {key: own[key] for key in self.loraplex if key in own}
        inner = {
            f"{at}.{key}": param for key, param in given.items() for at in ("spec", "delivery")
        }
        return {**inner, **PARAMS, **own, **named, **given}

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, wherever the client gives them."""
        if self.method is not None and self.method.supervised is not None:
            inner = self.method.supervised.hyperparameters
            if inner is not None:
                return inner
        return self.hyperparameters or Hyperparameters()


def _number(name: str, given: float | str) -> float | None:
    if given == AUTO:
        return None
    if isinstance(given, str):
        raise _refused(f"hyperparameters.{name}", "must be a number or 'auto'")
    return given


def _refused(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", param=param, code="invalid_value")
