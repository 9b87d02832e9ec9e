"""The one description of a base model that is passed around: without its weights, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_model.base.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base model as adapters are checked against it. The engine sends it to the front.

    Attributes:
        fingerprint: "sha256:<hex>" of the weights, compared with an adapter's stamp if it has one.
        dtype: compute dtype, in which adapters are packed too: "float32" or "bfloat16".
    """

    config: DecoderConfig
    fingerprint: str
    dtype: str
