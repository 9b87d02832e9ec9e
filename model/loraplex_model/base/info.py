"""The one description of a base model that is passed around: without its weights, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from loraplex_model.base.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base model as adapters are checked against it. The engine sends it to the front.

    Attributes:
        fingerprint: "sha256:<hex>" of the weights, compared with an adapter's stamp if it has one;
            "" for a base that has not been converted, with which no stamp is compared.
        dtype: compute dtype, in which adapters are packed too: "float32" or "bfloat16".
        name: public name of the model, for messages; "" if it is not known. Not compared.
        weights_file: path of the stored weights on this machine (`checkpoints.values`), with which
            an adapter's copies of them are compared; "" if there is none. Not compared.
    """

    config: DecoderConfig
    fingerprint: str
    dtype: str
    name: str = field(default="", compare=False)
    weights_file: str = field(default="", compare=False, repr=False)

    def named(self, model: str) -> BaseInfo:
        """The same base with the public name of `model`."""
        return replace(self, name=public_name(model))


def public_name(model: str) -> str:
    """The last part of a model's path or hub id.

    Clients see it, so it must not reveal the directories of the machine.
    """
    return model.rstrip("/").rpartition("/")[2]
