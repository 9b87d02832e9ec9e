"""Greedy answers of a model in training, computed by the decoder that will serve it.

Each call opens a decoder and drops it at the end: its copy of the weights and its KV cache take
memory that training needs between evaluations.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.open import block_size, open_decoder

from loraplex_training.data.samples import Sample
from loraplex_training.data.text import BaseText
from loraplex_training.run.evaluate import Answer

CACHE_TOKENS = 8192
"""Tokens of the KV cache that sequences share; a sequence that needs more gets them, alone."""


@dataclass
class _Sequence:
    """Token ids: the first `done` are in the KV cache, those from `start` on were generated."""

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

        An answer is cut before its first stop id, and before logits that are not finite. All
        prompts that fit into the cache run in one batch; on a CPU a row's answer does not depend
        on the others. Without `delta` the bare base answers. Prompts must not be empty.
        """
        room = self._base.config.max_positions - _virtual_tokens(delta)
        rows = [_Sequence(list(p), len(p), min(max_new_tokens, room - len(p))) for p in prompts]
        if waiting := [row for row in rows if row.limit > 0]:
            self._run(delta, waiting, frozenset(stop_ids))
        return [row.ids[row.start :] for row in rows]

    def logits(self, delta: AdapterDelta | None, ids: Sequence[int]) -> torch.Tensor:
        """Logits of one sequence in one pass of the serving decoder, float32 [T, vocab]."""
        sequence = _Sequence(list(ids), len(ids), 0)
        needed = self._blocks(delta, sequence)
        sequence.blocks = list(range(needed))
        serving = _Serving(self._base, self._cache, delta, needed)
        tokens = serving.begin(sequence)
        rows = list(range(len(tokens) - len(ids), len(tokens)))
        return serving.forward([(tokens, sequence)], rows)

    def _blocks(self, delta: AdapterDelta | None, sequence: _Sequence) -> int:
        """KV blocks that a sequence can come to need."""
        tokens = _virtual_tokens(delta) + sequence.start + sequence.limit
        return -(-tokens // block_size(self._base))

    def _run(
        self, delta: AdapterDelta | None, waiting: list[_Sequence], stop_ids: frozenset[int]
    ) -> None:
        """Continues all sequences; new ones begin as others end."""
        needs = [self._blocks(delta, sequence) for sequence in waiting]
        shared = self._cache_tokens // block_size(self._base)
        total = min(sum(needs), max(shared, max(needs)))
        serving = _Serving(self._base, self._cache, delta, total)
        free = list(range(total))
        running: list[_Sequence] = []
        while waiting or running:
            rows = [(sequence.ids[-1:], sequence) for sequence in running]
            while waiting and len(free) >= needs[0]:
                new = waiting.pop(0)
                new.blocks = [free.pop() for _ in range(needs.pop(0))]
                rows.append((serving.begin(new), new))
            logits = serving.forward(rows)
            running = []
            for (tokens, sequence), scores in zip(rows, logits, strict=True):
                sequence.done += len(tokens)
                token = int(scores.argmax())
                ended = token in stop_ids or not bool(torch.isfinite(scores[token]))
                if not ended:
                    sequence.ids.append(token)
                if ended or len(sequence.ids) == sequence.start + sequence.limit:
                    free += sequence.blocks
                else:
                    running.append(sequence)


class _Serving:
    """A decoder with at most one adapter, which is in its only slot and applies to every row."""

    def __init__(
        self, base: BaseWeights, cache: Path, delta: AdapterDelta | None, blocks: int
    ) -> None:
        tokens = blocks * block_size(base)
        positions = min(tokens, base.config.max_positions)
        self._decoder = open_decoder(base, blocks, 1, max_positions=positions, cache=cache)
        self._virtual = delta.virtual if delta else None
        self._mix: Mix = ()
        if delta is not None:
            with torch.inference_mode():
                packed = pack(delta, base.embed.dtype).to(base.embed.device)
                self._decoder.table.publish(0, packed)
            self._mix = ((0, 1.0),)

    def begin(self, sequence: _Sequence) -> list[int]:
        """The ids of the sequence's first pass; writes keys and values of virtual tokens."""
        virtual = self._virtual
        if virtual is None:
            return sequence.ids
        if virtual.keys is not None and virtual.values is not None:
            with torch.inference_mode():
                self._decoder.write_prefix(sequence.blocks, virtual.keys, virtual.values)
            sequence.done = virtual.count
            return sequence.ids
        first = self._decoder.weights.config.vocab_size
        return [*range(first, first + virtual.count), *sequence.ids]

    def forward(
        self, rows: Sequence[tuple[list[int], _Sequence]], logit_rows: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [R, vocab] after the new ids of each sequence, or of `logit_rows`."""
        batch = ForwardBatch.build(
            [(ids, sequence.done, sequence.blocks, self._mix) for ids, sequence in rows],
            logit_rows,
        )
        with torch.inference_mode():
            return self._decoder.forward(batch)


def answering(generator: Generator, text: BaseText) -> Answer:
    """The `Answer` of evaluations: the texts with which a model continues examples' prompts.

    An answer may be somewhat longer than the longest expected one.
    """

    def answer(delta: AdapterDelta | None, samples: Sequence[Sample]) -> list[str]:
        wanted = max((len(sample.tokens) - sample.prompt for sample in samples), default=0)
        prompts = [sample.tokens[: sample.prompt] for sample in samples]
        said = generator.answers(delta, prompts, wanted + wanted // 4 + 8, text.eos_ids)
        return [text.decode(ids) for ids in said]

    return answer


def _virtual_tokens(delta: AdapterDelta | None) -> int:
    return delta.virtual.count if delta and delta.virtual else 0
