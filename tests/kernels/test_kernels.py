"""Each kernel gives what its formula gives in float64; a row's bits do not depend on the others."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_float, c_int32, c_void_p

import numpy as np
import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.adapters.table import SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import PROJECTIONS, DecoderConfig
from loraplex_model.decoder import layout
from loraplex_model.decoder.layout import CMatrix
from loraplex_model.ops import nf4

NF4 = nf4.nf4_code()
DTYPES = [torch.float32, torch.bfloat16]
PLACES = [(0, 0), (5, 0), (16, 0), (77, 0), (77, 20), (77, 1)]  # positions and windows


def pointer(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def matmul(
    library: ctypes.CDLL, matrix: CMatrix, x: torch.Tensor, threads: int = 2
) -> torch.Tensor:
    y = torch.full((x.shape[0], matrix.out), float("nan"))
    library.loraplex_matmul(byref(matrix), pointer(x), x.shape[0], pointer(y), threads)
    return y


@pytest.mark.parametrize(("out", "fan_in"), [(16, 64), (40, 128), (960, 576), (130, 1536)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 7, 16, 33, 97, 200])
def test_nf4_product_is_that_of_the_dequantised_matrix(
    library: ctypes.CDLL, out: int, fan_in: int, rows: int
) -> None:
    torch.manual_seed(out + rows)
    codes = torch.randint(0, 16, (out, fan_in), dtype=torch.uint8)
    absmax = torch.rand(out, fan_in // 64) + 0.1
    dense = NF4[codes.long()].double() * absmax.double().repeat_interleave(64, 1)
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    panels, scales = layout.nf4_panels(library, packed, absmax, out, fan_in)
    bias, x = torch.randn(out), torch.randn(rows, fan_in)
    matrix = CMatrix(
        data=panels.data_ptr(), absmax=scales.data_ptr(), bias=bias.data_ptr(), out=out, in_=fan_in
    )
    y = matmul(library, matrix, x)
    assert relative_error(y, x.double() @ dense.T + bias.double()) < 1e-6
    for row in {0, rows // 2, rows - 1}:
        alone = matmul(library, matrix, x[row : row + 1].contiguous(), threads=1)
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "fan_in"), [(1, 16), (17, 48), (512, 80), (300, 576)])
@pytest.mark.parametrize("rows", [1, 4, 6, 13, 100])
def test_dense_product_is_the_matrix_product(
    library: ctypes.CDLL, dtype: torch.dtype, out: int, fan_in: int, rows: int
) -> None:
    torch.manual_seed(out + rows)
    weight, x = torch.randn(out, fan_in).to(dtype), torch.randn(rows, fan_in)
    panels = layout.dense_panels(weight)
    kind = layout.Storage.BF16 if dtype == torch.bfloat16 else layout.Storage.F32
    matrix = CMatrix(data=panels.data_ptr(), out=out, in_=fan_in, kind=kind)
    y = matmul(library, matrix, x)
    assert relative_error(y, x.double() @ weight.double().T) < 1e-6
    alone = matmul(library, matrix, x[-1:].contiguous())
    assert torch.equal(alone[0], y[-1])


def lora_config(hidden: int, kv: int) -> DecoderConfig:
    return DecoderConfig(
        architecture="test",
        vocab_size=16,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=kv,
        rms_norm_eps=1e-5,
        rope_inv_freq=(),
        rope_scale=1.0,
        max_positions=1,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        tie_embeddings=True,
        sliding_windows=(None, None),
    )


class CFused(Structure):
    """`Fused`: which projections a fused matrix holds, and where."""

    _fields_ = (
        ("parts", c_int32),
        ("projection", c_int32 * 3),
        ("column", c_int32 * 3),
        ("width", c_int32 * 3),
    )


def random_delta(rng: np.random.Generator, rank: int, fan_in: int, out: int) -> ProjectionDelta:
    """A random change of a projection: any of matrices, gain and bias, but not none."""
    kind = rng.integers(1, 8)
    return ProjectionDelta(
        a=torch.randn(rank, fan_in) if kind & 1 else None,
        b=torch.randn(rank, out) * float(rng.uniform(0.1, 2)) if kind & 1 else None,
        gain=torch.randn(out) if kind & 2 else None,
        bias=torch.randn(out) if kind & 4 else None,
    )


def run_lora(
    library: ctypes.CDLL,
    table: SlotTable,
    batch: ForwardBatch,
    config: DecoderConfig,
    dtype: torch.dtype,
    x: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    widths = [config.q_size, config.kv_size, config.kv_size]
    columns = [0, widths[0], widths[0] + widths[1]]
    fused = CFused(3, (0, 1, 2), tuple(columns), tuple(widths))
    y = y.clone()
    library.loraplex_lora(
        byref(layout.c_adapters(table)),
        byref(layout.c_batch(batch)),
        byref(fused),
        1,
        int(dtype == torch.bfloat16),
        pointer(x),
        x.shape[1],
        pointer(y),
        y.shape[1],
    )
    return y


RANKS = [[1], [2], [4], [8], [16], [64], [128], [1, 2, 4, 8, 16, 64, 128, 5, 33]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 48, 80, 112, 272, 576])
@pytest.mark.parametrize("ranks", RANKS, ids=lambda r: "mixed" if len(r) > 1 else str(r[0]))
@pytest.mark.parametrize("adapters", [1, 8, 32])
def test_lora_on_mixed_rows_is_the_sum_of_its_terms(
    library: ctypes.CDLL, dtype: torch.dtype, hidden: int, ranks: list[int], adapters: int
) -> None:
    """Rows of 1, 4, 16 and 33 tokens, base rows, single adapters and blends, in one batch."""
    rng = np.random.default_rng(hidden * 1000 + sum(ranks) * 10 + adapters)
    torch.manual_seed(int(rng.integers(1 << 30)))
    config = lora_config(hidden, kv=hidden)
    shapes = config.projection_shapes()
    table = SlotTable(adapters, config)
    for slot in range(adapters):
        rank = ranks[slot % len(ranks)]
        sites = {
            (1, name): random_delta(rng, rank, hidden, shapes[name][1])
            for name in PROJECTIONS[:3]
            if rng.random() < 0.8
        }
        sites[0, "q_proj"] = ProjectionDelta(a=torch.ones(rank, hidden), b=torch.ones(rank, hidden))
        table.publish(slot, pack(AdapterDelta(sites), dtype))

    sequences = []
    for length in [1, 1, 4, 1, 16, 1, 33, 1, 1]:
        kind = rng.integers(3)
        if kind == 0:
            mix: tuple[tuple[int, float], ...] = ()
        elif kind == 1:
            mix = ((int(rng.integers(adapters)), 1.0),)
        else:
            mix = tuple((int(rng.integers(adapters)), float(rng.uniform(-2, 2))) for _ in range(2))
        sequences.append(([0] * length, 0, [0], mix))
    batch = ForwardBatch.build(sequences)
    rows = len(batch.tokens)
    x, base = torch.randn(rows, hidden), torch.randn(rows, 3 * hidden)
    got = run_lora(library, table, batch, config, dtype, x, base)

    want = base.double()
    start = 0
    for ids, _, _, mix in sequences:
        end = start + len(ids)
        for part, name in enumerate(PROJECTIONS[:3]):
            found = [
                (table.delta(slot).at((1, name), ProjectionDelta), weight) for slot, weight in mix
            ]
            y = want[start:end, part * hidden : (part + 1) * hidden]
            gain = 1.0
            for change, weight in found:
                if change is not None and change.gain is not None:
                    gain = gain + weight * (change.gain.double() - 1)
            y *= gain
            for change, weight in found:
                if change is not None and change.a is not None and change.b is not None:
                    inner = x[start:end].double() @ change.a.double().T
                    y += weight * inner @ change.b.double()
                if change is not None and change.bias is not None:
                    y += weight * change.bias.double()
        if not mix:
            assert torch.equal(got[start:end], base[start:end]), "a base row was touched"
        start = end
    assert relative_error(got, want) < 2e-6

    start = 0
    for ids, _, _, mix in sequences:
        end = start + len(ids)
        alone = run_lora(
            library,
            table,
            ForwardBatch.build([([0] * (end - start), 0, [0], mix)]),
            config,
            dtype,
            x[start:end].contiguous(),
            base[start:end].contiguous(),
        )
        assert torch.equal(alone, got[start:end]), "a row's bits depend on its batch mates"
        start = end


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 16), (9, 3, 64), (8, 1, 24), (4, 2, 96)]
)
@pytest.mark.parametrize(
    ("position", "window", "softcap"),
    [
        *((at, window, 0) for at, window in PLACES),
        (77, 0, 2),
        (9, 5, 0.5),
    ],
)
def test_paged_attention_is_causal_softmax_attention(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    position: int,
    window: int,
    softcap: float,
) -> None:
    torch.manual_seed(position + heads)
    block_size, blocks = 16, torch.randperm(8).int()
    keys = torch.randn(8, kv_heads, block_size, head_dim).to(dtype)
    values = torch.randn(8, kv_heads, block_size, head_dim).to(dtype)
    q, out = torch.randn(heads, head_dim), torch.empty(heads, head_dim)
    scale = head_dim**-0.5
    library.loraplex_attention(
        pointer(q),
        pointer(keys),
        pointer(values),
        pointer(blocks),
        int(dtype == torch.bfloat16),
        block_size,
        kv_heads,
        head_dim,
        heads,
        position,
        window,
        c_float(scale),
        c_float(softcap),
        pointer(out),
    )
    first = max(0, position - window + 1) if window else 0

    def seen(pages: torch.Tensor) -> torch.Tensor:  # [positions, heads, head_dim]
        rows = pages.transpose(1, 2)[blocks.long()].flatten(0, 1)
        return rows[first : position + 1].double().repeat_interleave(heads // kv_heads, 1)

    k, v = seen(keys), seen(values)
    scores = torch.einsum("hd,jhd->hj", q.double(), k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores, -1)
    assert relative_error(out, torch.einsum("hj,jhd->hd", weights, v)) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 48, 576, 577])
def test_rms_norm_adds_the_residual_first(
    library: ctypes.CDLL, dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(width)
    x, y, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width).to(dtype)
    total, out = x.clone(), torch.empty(5, width)
    library.loraplex_add_rms_norm(
        pointer(total),
        pointer(y),
        pointer(weight),
        int(dtype == torch.bfloat16),
        c_float(1e-5),
        5,
        width,
        pointer(out),
    )
    assert torch.equal(total, x + y)
    want = torch.nn.functional.rms_norm(total.double(), (width,), weight.double(), 1e-5)
    assert relative_error(out, want) < 1e-6


def test_bfloat16_is_rounded_to_the_nearest_even_as_torch_does(library: ctypes.CDLL) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_003,), dtype=torch.int64).to(torch.int32)
    x = torch.cat(
        [bits.view(torch.float32), torch.tensor([float("inf"), -float("inf"), -0.0, 1e-45])]
    )
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    library.loraplex_to_bf16(pointer(x), len(x), pointer(out))
    want = x.bfloat16()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])
