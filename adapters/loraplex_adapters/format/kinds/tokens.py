"""TRAINABLE_TOKENS: rows that replace those of the base's embeddings and head."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_adapters.format.copies.names import COPY_ENDINGS
from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.whole import row_modules
from loraplex_adapters.format.modules import EMBEDDING, HEAD
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, served
from loraplex_adapters.format.targets import EMBEDDINGS, Targets

_ENDING = "trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class TokensReading:
    """The token ids, in the order of their rows, and the modules that have such rows."""

    token_ids: tuple[int, ...]
    targets: Targets

    def place(self, file: Placement) -> list[ModuleSpec]:
        """Rows of the embeddings, the head or both.

        PEFT writes the rows of tied embeddings twice; if it did not, both modules use the same.
        """
        adapted = file.sites(_ENDING)
        tensors = {site: file.require(site, _ENDING) for site in adapted}
        if file.base.config.tie_embeddings and EMBEDDING in tensors:
            tensors.setdefault(HEAD, tensors[EMBEDDING])
        else:
            file.check_targets(self.targets, EMBEDDINGS, adapted)
        modules = []
        for site, tensor in tensors.items():
            modules += row_modules(file, site, tensor, self.token_ids, "token_indices")
        return modules


def _read(reader: Reader) -> TokensReading | None:
    ids = reader.token_ids("token_indices", reader.config.get("token_indices"))
    targets = reader.targets()
    return TokensReading(ids, targets) if ids else None


TRAINABLE_TOKENS = Kind(
    peft_type="TRAINABLE_TOKENS",
    summary="trained rows of embeddings and head",
    options={
        "init_weights": ignored(),
        "target_modules": served("embed_tokens, lm_head; names or an expression"),
        "token_indices": served(),
    },
    endings={_ENDING: "", **COPY_ENDINGS},
    read=_read,
)
