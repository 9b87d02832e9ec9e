"""The plan of a pass's adapters for the device, and the device's copy of the slot table.

The oracle of the plan is `mix.groups_of`, by which the decoder in torch works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta, RowsDelta
from loraplex_model.adapters.mix import RowGroup, groups_of
from loraplex_model.adapters.pack import pack
from loraplex_model.adapters.table import DenseMatrix, Merged, SlotTable, Uses
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.config import FUSED, MODEL, DecoderConfig
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import (
    CHUNK_ROWS,
    ChunkPlan,
    PlanCapacity,
    plan_chunks,
    plan_head,
)
from loraplex_model.decoder.cuda.table import WORDS, DeviceTable

from tests.model.changes import KINDS, random_adapter

CPU = torch.device("cpu")

CONFIG = DecoderConfig(
    architecture="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_inv_freq=(1.0, 0.5, 0.25, 0.125),
    rope_scale=1.0,
    max_positions=64,
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    tie_embeddings=False,
    sliding_windows=(None, None),
)


def table_of(kinds: Sequence[str], merged: Sequence[int] = ()) -> SlotTable:
    """A table with one adapter of each kind, of which some are merged."""
    table = SlotTable(len(kinds), CONFIG)
    for slot, kind in enumerate(kinds):
        table.publish(slot, pack(random_adapter(kind, CONFIG, slot), torch.float32))
    for slot in merged:
        matrix = DenseMatrix(torch.zeros(16, 16), None)
        addresses = np.zeros((CONFIG.num_layers, len(FUSED)), np.uint64)
        table.publish_merge(slot, Merged({(0, "o"): matrix}, addresses, 0))
    return table


SLOTS = (*KINDS, "lora", "everything")
MERGED = (len(KINDS), len(KINDS) + 1)
TABLE = table_of(SLOTS, MERGED)

MIXES: st.SearchStrategy[Mix] = st.one_of(
    st.just(()),
    st.integers(0, len(SLOTS) - 1).map(lambda slot: ((slot, 1.0),)),
    st.lists(
        st.tuples(st.integers(0, len(SLOTS) - 1), st.sampled_from([0.5, 1.0, -2.0])),
        min_size=1,
        max_size=3,
        unique_by=lambda term: term[0],
    ).map(tuple),
)


@st.composite
def batches(draw: st.DrawFn) -> ForwardBatch:
    """Sequences of one or many rows, whose mixes often equal their neighbours'."""
    mixes = draw(st.lists(MIXES, min_size=1, max_size=4))
    sequences = draw(
        st.lists(
            st.tuples(st.one_of(st.just(1), st.integers(1, 40)), st.sampled_from(mixes)),
            min_size=1,
            max_size=12,
        )
    )
    total = sum(rows for rows, _ in sequences)
    wanted = sorted(draw(st.sets(st.integers(0, total - 1))))
    return ForwardBatch.build([([1] * rows, 0, [0], mix) for rows, mix in sequences], wanted)


@dataclass(frozen=True)
class RowChanges:
    """What the oracle says of a row: its adapters by identity, and whether it is merged."""

    adapters: tuple[tuple[int, float], ...]
    is_dense: bool


def by_row(groups: list[RowGroup]) -> dict[int, tuple[RowChanges, list[AdapterDelta]]]:
    """The changes of each row that has adapters."""
    found = {}
    for group in groups:
        terms = tuple((id(delta), weight) for delta, weight in group.adapters)
        changes = RowChanges(terms, group.dense is not None)
        for row in group.rows.tolist():
            assert row not in found
            found[row] = changes, [delta for delta, _ in group.adapters]
    return found


def in_kernels(delta: AdapterDelta) -> bool:
    """Whether an adapter changes any projection otherwise than by its input."""
    return any(
        isinstance(change, ProjectionDelta)
        and any(part is not None for part in (change.b, change.gain, change.bias))
        for change in delta.sites.values()
    )


def outside_kernels(delta: AdapterDelta) -> bool:
    """Whether an adapter changes anything else, the inputs of projections included."""
    return any(
        not isinstance(change, ProjectionDelta) or change.in_gain is not None
        for change in delta.sites.values()
    )


def check_plan(
    plan: ChunkPlan, rows: int, want: dict[int, tuple[RowChanges, list[AdapterDelta]]]
) -> dict[int, int]:
    """Compares segments and chunks with the oracle's rows; returns the chunk of each row."""
    seen: dict[int, RowChanges] = {}
    segment_of = {}
    for segment in plan.segments:
        terms = tuple((id(TABLE.delta(slot)), weight) for slot, weight in segment.mix)
        for row in range(segment.first, segment.end):
            seen[row] = RowChanges(terms, segment.merged >= 0)
            segment_of[row] = segment
        if segment.merged >= 0:
            assert segment.mix == ((segment.merged, 1.0),)
    assert seen == {row: changes for row, (changes, _) in want.items()}

    chunk_of = {}
    used = []
    for c, (begin, end) in enumerate(zip(plan.chunk_begin, plan.chunk_end, strict=True)):
        assert 0 < end - begin <= CHUNK_ROWS
        terms = range(plan.term_start[c], plan.term_start[c + 1])
        mix = tuple((int(plan.term_slot[t]), float(plan.term_weight[t])) for t in terms)
        for row in range(begin, end):
            assert row not in chunk_of
            assert segment_of[row].mix == mix
            chunk_of[row] = c
        for t in terms:
            used.extend(range(plan.term_row[t], plan.term_row[t] + end - begin))
            assert plan.rank_stride >= TABLE.max_ranks[plan.term_slot[t]]
    assert sorted(used) == list(range(plan.h_rows)), "rows of A x are disjoint and have no gaps"
    assert plan.rank_stride % 16 == 0
    assert plan.row_chunk.tolist() == [chunk_of.get(row, -1) for row in range(rows)]
    return chunk_of


@given(batches())
@settings(max_examples=150, deadline=None)
def test_a_plan_covers_the_rows_as_the_decoder_in_torch_groups_them(batch: ForwardBatch) -> None:
    rows = len(batch.tokens)
    sequences = np.repeat(np.arange(len(batch.context_lens)), np.diff(batch.query_starts))
    want = by_row(groups_of(batch, TABLE, sequences.tolist(), CPU))
    plan = plan_chunks(batch, TABLE)
    chunk_of = check_plan(plan, rows, want)
    for row, (changes, deltas) in want.items():
        assert (row in chunk_of) == (not changes.is_dense and any(map(in_kernels, deltas)))
    in_torch = {row for s in plan.torch_segments for row in range(s.first, s.end)}
    assert in_torch == {
        row
        for row, (changes, deltas) in want.items()
        if changes.is_dense or any(map(outside_kernels, deltas))
    }
    uses = Uses(0)
    for segment in plan.segments:
        uses |= segment.uses
    assert plan.uses == uses
    max_rank = int(TABLE.max_ranks.max())
    assert plan.fits(PlanCapacity.of_rows(rows, max_rank, 3))
    assert not plan.fits(PlanCapacity.of_rows(rows - 1, max_rank, 3))


@given(batches())
@settings(max_examples=100, deadline=None)
def test_the_plan_of_the_head_covers_the_wanted_rows(batch: ForwardBatch) -> None:
    """Dense matrices replace those of layers, so they do not take the head's changes away."""
    sequences = np.repeat(np.arange(len(batch.context_lens)), np.diff(batch.query_starts))
    wanted = sequences[batch.logit_rows].tolist()
    want = by_row(groups_of(batch, TABLE, wanted, CPU))
    chunk_of = check_plan(plan_head(batch, TABLE), len(wanted), want)
    for row, (_, deltas) in want.items():
        changed = any(d.at((MODEL, "lm_head"), RowsDelta) is not None for d in deltas)
        assert (row in chunk_of) == changed


def test_a_plan_that_fits_overwrites_a_longer_one() -> None:
    """Whatever lay in the buffers, the plan's own numbers lie at their front afterwards."""
    long = ForwardBatch.build([([1] * 40, 0, [0], ((0, 1.0), (1, 0.5))), ([1], 0, [1], ())])
    short = ForwardBatch.build([([1] * 3, 0, [0], ()), ([1] * 2, 0, [1], ((1, 1.0),))])
    first = plan_chunks(long, TABLE)
    entries = torch.zeros(len(SLOTS), CONFIG.num_sites, WORDS, dtype=torch.int64)
    lora = LoraPass.of(first, entries)
    addresses = {name: getattr(lora, name).data_ptr() for name in first.arrays()}
    second = plan_chunks(short, TABLE)
    assert second.fits(lora.capacity)
    assert not first.fits(second.capacity)
    lora.load(second)
    for name, array in second.arrays(lora.capacity.rows).items():
        tensor = getattr(lora, name)
        assert tensor.data_ptr() == addresses[name]
        assert torch.equal(tensor[: len(array)], torch.from_numpy(array))
    assert lora.chunk_count.item() == 1
    assert lora.row_chunk.tolist() == [-1] * 3 + [0] * 2 + [-1] * 36
    with pytest.raises(AssertionError, match="does not fit"):
        LoraPass.of(second, entries).load(first)


def words(table: SlotTable) -> torch.Tensor:
    """The host's entries as the device has them."""
    return torch.from_numpy(
        np.frombuffer(table.entries.tobytes(), np.int64).reshape(*table.entries.shape, WORDS).copy()
    )


def test_the_device_table_has_the_bytes_of_the_host_at_a_fixed_address() -> None:
    table = table_of(["lora", "everything", "gains"])
    device = DeviceTable(table, CPU)
    address = device.entries.data_ptr()
    assert torch.equal(device.entries, words(table))
    ranks = (device.entries[..., 8] & 0xFFFFFFFF).int()
    assert torch.equal(ranks, torch.from_numpy(table.entries["rank"].copy()))
    table.remove(1)
    table.publish(1, pack(random_adapter("lora", CONFIG, 9), torch.float32))
    table.remove(0)
    assert device.update() == 2
    assert torch.equal(device.entries, words(table))
    assert device.entries.data_ptr() == address
    assert not device.entries[0].any()


def test_only_changed_slots_are_copied() -> None:
    table = table_of(["lora"] * 11)
    device = DeviceTable(table, CPU)
    assert device.update() == 0
    device.entries.fill_(-1)
    table.remove(3)
    table.publish(3, pack(random_adapter("everything", CONFIG, 4), torch.float32))
    table.remove(10)
    assert table.changed == {3, 10}
    assert device.update() == 2
    assert table.changed == set()
    want = words(table)
    for slot in range(11):
        if slot in (3, 10):
            assert torch.equal(device.entries[slot], want[slot])
        else:
            assert (device.entries[slot] == -1).all()


def test_merging_leaves_the_entries_as_they_are() -> None:
    table = table_of(["lora"])
    device = DeviceTable(table, CPU)
    table.publish_merge(0, Merged({}, np.zeros((CONFIG.num_layers, len(FUSED)), np.uint64), 0))
    table.remove_merge(0)
    assert device.update() == 0
    assert torch.equal(device.entries, words(table))
