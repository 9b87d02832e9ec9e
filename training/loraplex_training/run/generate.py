"""Answers of a model in training, through the decoder that will serve it.

A decoder is made for each call and let go afterwards: its copy of the weights and its KV cache take
memory that training needs between evaluations.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta, SiteDelta, VirtualTokens
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops import build as kernels

from loraplex_training.data.samples import Sample
from loraplex_training.data.text import BaseText
from loraplex_training.run.evaluate import Answer

log = logging.getLogger(__name__)

BLOCK = {"cpu": 16, "cuda": 256}  # tokens; flash attention's pages are 256
CACHE_TOKENS = 8192
"""KV cache that sequences share; one that needs more gets it, alone."""

Decoder = NativeDecoder | ReferenceDecoder


@dataclass
class _Sequence:
    """Ids of which the first `done` are in the cache; those after `start` have been generated."""

    ids: list[int]
    start: int
    limit: int
    done: int = 0
    blocks: list[int] = field(default_factory=list)


class Generator:
    """Greedy generation over one base, alone or with an adapter.

    Not thread-safe; may run while nothing trains.
    """

    def __init__(self, base: BaseWeights, cache: Path, cache_tokens: int = CACHE_TOKENS) -> None:
        """`cache` holds the compiled kernels, as `loraplex-server --cache` does."""
        self._base = base
        self._cache = cache
        self._cache_tokens = cache_tokens

    def answers(
        self,
        delta: AdapterDelta | None,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
    ) -> list[list[int]]:
        """The most likely continuation of each prompt, at most `max_new_tokens` ids.

        One that ends with a stop id is cut before it. All prompts that fit into the cache run in
        one batch; what a row says does not depend on the others on a CPU. None is the bare base. A
        row whose logits are not finite ends there. Prompts are not empty.
        """
        plain = None if delta is None else _plain(delta)
        virtual = plain.virtual.count if plain and plain.virtual else 0
        context = self._base.config.max_positions
        room = context - virtual
        rows = [_Sequence(list(p), len(p), min(max_new_tokens, room - len(p))) for p in prompts]
        if waiting := [row for row in rows if row.limit > 0]:
            self._run(plain, virtual, waiting, frozenset(stop_ids))
        return [row.ids[row.start :] for row in rows]

    def logits(self, delta: AdapterDelta | None, ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, vocab]: what the serving decoder makes of one sequence, in one pass."""
        plain = None if delta is None else _plain(delta)
        virtual = plain.virtual.count if plain and plain.virtual else 0
        block = BLOCK[self._base.embed.device.type]
        blocks = -(-(virtual + len(ids)) // block)
        decoder, mix = self._serve(plain, blocks, block)
        sequence = _Sequence(list(ids), len(ids), 0, 0, list(range(blocks)))
        tokens = _begin(decoder, sequence, plain.virtual if plain else None)
        rows = list(range(len(tokens) - len(ids), len(tokens)))
        batch = ForwardBatch.build([(tokens, sequence.done, sequence.blocks, mix)], rows)
        with torch.inference_mode():
            return decoder.forward(batch)

    def _run(
        self,
        delta: AdapterDelta | None,
        virtual: int,
        waiting: list[_Sequence],
        stop_ids: frozenset[int],
    ) -> None:
        """Continues all sequences, new ones beginning as others end."""
        block = BLOCK[self._base.embed.device.type]
        needs = {id(s): -(-(virtual + s.start + s.limit) // block) for s in waiting}
        total = min(sum(needs.values()), max(self._cache_tokens // block, max(needs.values())))
        decoder, mix = self._serve(delta, total, block)
        free = list(range(total))
        running: list[_Sequence] = []
        while waiting or running:
            rows = [(s.ids[-1:], s.done, s.blocks, mix) for s in running]
            while waiting and len(free) >= needs[id(waiting[0])]:
                new = waiting.pop(0)
                new.blocks = [free.pop() for _ in range(needs[id(new)])]
                tokens = _begin(decoder, new, delta.virtual if delta else None)
                rows.append((tokens, new.done, new.blocks, mix))
                running.append(new)
            with torch.inference_mode():
                logits = decoder.forward(ForwardBatch.build(rows))
            going = []
            for sequence, row, scores in zip(running, rows, logits, strict=True):
                sequence.done += len(row[0])
                token = int(scores.argmax())
                ended = token in stop_ids or not bool(torch.isfinite(scores[token]))
                if not ended:
                    sequence.ids.append(token)
                if ended or len(sequence.ids) == sequence.start + sequence.limit:
                    free += sequence.blocks
                else:
                    going.append(sequence)
            running = going

    def _serve(
        self, delta: AdapterDelta | None, blocks: int, block: int
    ) -> tuple[Decoder, Mix]:  # fmt: skip
        """A decoder with the adapter in its slot, and what rows say to use it."""
        decoder = _decoder(self._base, blocks, block, self._cache)
        if delta is None:
            return decoder, ()
        dtype, device = self._base.embed.dtype, self._base.embed.device
        with torch.inference_mode():
            decoder.table.publish(0, pack(delta, dtype).to(device))
        return decoder, ((0, 1.0),)


def answering(generator: Generator, text: BaseText) -> Answer:
    """What evaluations ask: the texts that a model says to the prompts of examples.

    An answer gets some more room than the longest that is wanted.
    """

    def answer(delta: AdapterDelta | None, samples: Sequence[Sample]) -> list[str]:
        wanted = max((len(sample.tokens) - sample.prompt for sample in samples), default=0)
        prompts = [sample.tokens[: sample.prompt] for sample in samples]
        said = generator.answers(delta, prompts, wanted + wanted // 4 + 8, text.eos_ids)
        return [text.decode(ids) for ids in said]

    return answer


def _begin(decoder: Decoder, sequence: _Sequence, virtual: VirtualTokens | None) -> list[int]:
    """The ids to compute first; keys and values before the prompt are put into the cache."""
    if virtual is None:
        return sequence.ids
    if virtual.keys is not None and virtual.values is not None:
        decoder.write_prefix(sequence.blocks, virtual.keys, virtual.values)
        sequence.done = virtual.count
        return sequence.ids
    first = decoder.weights.config.vocab_size
    return [*range(first, first + virtual.count), *sequence.ids]


def _decoder(weights: BaseWeights, blocks: int, block: int, cache: Path) -> Decoder:
    embed = weights.embed
    if embed.device.type == "cpu" and embed.dtype in (torch.float32, torch.bfloat16):
        try:
            library = kernels.load(directory=cache / "kernels")
            positions = min(blocks * block, weights.config.max_positions)
            return NativeDecoder(
                weights, blocks, block, 1, max_positions=positions, library=library
            )
        except kernels.KernelsUnavailable as error:
            log.warning("no compiled kernels, so answers take long: %s", error)
    return ReferenceDecoder(weights, blocks, block, 1)


def _plain(delta: AdapterDelta) -> AdapterDelta:
    """Without gradients, and on the host, as adapters are packed from there; vectors in float32."""

    def tensor(name: str, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().cpu()
        return value if name in ("a", "b", "rows", "token_ids") else value.float()

    sites = {
        site: SiteDelta(**{name: tensor(name, getattr(change, name)) for name in _FIELDS})  # type: ignore[arg-type]
        for site, change in delta.sites.items()
    }
    virtual = delta.virtual
    if virtual is not None:
        held = {
            name: value.detach().cpu()
            for name in ("embeddings", "keys", "values")
            if (value := getattr(virtual, name)) is not None
        }
        virtual = replace(virtual, **held)
    return AdapterDelta(sites, virtual)


_FIELDS = tuple(SiteDelta.__dataclass_fields__)
