"""The cost of 4-bit formats (QLoRA, arXiv 2305.14314, table 2 and figure 3): make bench-paper

First the error |W' - W| / |W| of matrices with three distributions, by format and block size. Then
the predictions of a small language model for Python text that it has not seen, with its projections
rounded to each format. NF4 with double quantisation (DQ) is the server's own quantiser, and the
server's decoder is checked too.

Int4 is symmetric: absmax / 7 times -7 to 7. FP4 is bitsandbytes' (E2M1).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.ops import nf4
from loraplex_model.ops.quiet import quieten_bitsandbytes
from paper import small_model, sweeps
from paper.conclusion import conclude
from report import table
from transformers import LlamaForCausalLM

SIZE, BLOCKS = 1024, (64, 128, 256, 512, 1024, 2048, 4096)
PIECES = 400

Format = Callable[[torch.Tensor], torch.Tensor]


def int4(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Rounds to the nearest of -7/7 to 7/7 times the block's absmax."""
    blocks = weight.reshape(-1, block)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return (torch.round(blocks / step) * step).view_as(weight)


def by_bitsandbytes(kind: str, weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Rounds to NF4 or FP4 with float32 maxima."""
    quieten_bitsandbytes()
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=block, quant_type=kind))


FORMATS: Mapping[str, Format] = {
    "NF4": partial(by_bitsandbytes, "nf4"),
    "NF4+DQ": lambda weight: nf4.dequantize(nf4.quantise(weight)),
    "FP4": partial(by_bitsandbytes, "fp4"),
    "Int4": int4,
}
WIDE = "NF4, blocks of 4096"


def shapes() -> dict[str, torch.Tensor]:
    """Matrices of 1024 x 1024: Gaussian, Student's t with 5 degrees of freedom, uniform."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(7, SIZE, SIZE, generator=random)
    return {
        "Gaussian": normal[0],
        "Student t5": normal[1] / normal[2:].square().mean(0).sqrt(),
        "uniform": 2 * torch.rand(SIZE, SIZE, generator=random) - 1,
    }


def error(weight: torch.Tensor, found: torch.Tensor) -> float:
    """Relative error |W' - W| / |W| in the Frobenius norm."""
    return float((found - weight).norm() / weight.norm())


def errors() -> dict[str, dict[str, float]]:
    """Relative errors by distribution and format, with blocks of 64."""
    return {
        shape: {name: error(weight, rounded(weight)) for name, rounded in FORMATS.items()}
        for shape, weight in shapes().items()
    }


def by_block() -> dict[str, list[float]]:
    """Relative errors of a Gaussian matrix by format, for each block size in `BLOCKS`."""
    weight = shapes()["Gaussian"]
    roads = {"NF4": partial(by_bitsandbytes, "nf4"), "FP4": partial(by_bitsandbytes, "fp4")}
    return {
        name: [error(weight, rounded(weight, block=block)) for block in BLOCKS]
        for name, rounded in {**roads, "Int4": int4}.items()
    }


@dataclass(frozen=True, slots=True)
class Read:
    """Results of a model on fixed pieces of text: means over the bytes of a piece, float64
    [PIECES].

    `loss` is the cross-entropy in nats. `divergence` is KL(float32 || this): the divergence of the
    model's predictions from those of the float32 model. Unlike the loss, it cannot become smaller
    by chance, when a rounded model happens to predict some text better.
    """

    loss: torch.Tensor
    divergence: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Perplexity per byte."""
        return math.exp(float(self.loss.mean()))


def reads() -> dict[str, Read]:
    """Results of the model by format."""
    model = small_model.model()
    text = small_model.python_text().evaluation
    pieces = small_model.windows(text, PIECES, small_model.CONTEXT, seed=1)
    exact = _predictions(model, pieces)
    wide = partial(by_bitsandbytes, "nf4", block=4096)
    found = {"float32": _read(exact, exact, pieces)}
    for name, rounded in {**FORMATS, WIDE: wide}.items():
        found[name] = _read(_predictions(_with(model, rounded), pieces), exact, pieces)
    return found


def _with(model: LlamaForCausalLM, rounded: Format) -> LlamaForCausalLM:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(f"{module}.weight" for module in PROJECTIONS)):
                parameter.copy_(rounded(parameter))
    return model


@torch.no_grad()
def _predictions(model: LlamaForCausalLM, pieces: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [PIECES, CONTEXT - 1, 256]."""
    return torch.cat([model(some[:, :-1]).logits.log_softmax(-1) for some in pieces.split(50)])


def _read(found: torch.Tensor, exact: torch.Tensor, pieces: torch.Tensor) -> Read:
    loss = -found.gather(-1, pieces[:, 1:, None])[..., 0]
    divergence = (exact.exp() * (exact - found)).sum(-1)
    return Read(loss.double().mean(1), divergence.double().mean(1))


def served() -> float:
    """Mean loss of the same pieces computed by the server's own decoder, on its own NF4 bytes."""
    text = small_model.Text(torch.empty(0), small_model.python_text().evaluation)
    sweep = sweeps.Sweep(small_model.base(), text, 0, 0.0)
    return sweeps.loss_of(sweep, None, PIECES, seed=1)


def apart(more: torch.Tensor, less: torch.Tensor) -> bool:
    """Whether the mean difference over the same pieces exceeds three of its standard errors."""
    difference = more - less
    return bool(difference.mean() > 3 * difference.std() / len(difference) ** 0.5)


def main() -> int:
    """Prints the tables, the relations and the JSON line."""
    by_shape, blocks, read, same = errors(), by_block(), reads(), served()
    print(table(["weights", *FORMATS], [[k, *v.values()] for k, v in by_shape.items()]))
    print()
    print(table(["Gaussian", *map(str, BLOCKS)], [[k, *v] for k, v in blocks.items()]))
    print()
    told = [[k, f"{v.perplexity:.4f}", float(v.divergence.mean())] for k, v in read.items()]
    print(table(["format", "perplexity", "divergence from float32"], told))
    values = {
        "error": by_shape,
        "error_by_block": {"block": BLOCKS, **blocks},
        "perplexity": {name: each.perplexity for name, each in read.items()},
        "divergence": {name: float(each.divergence.mean()) for name, each in read.items()},
    }
    relations = {
        **of_errors(by_shape, blocks),
        **of_models(read),
        "the server's decoder on its NF4 bytes has the same loss": math.isclose(
            same, float(read["NF4+DQ"].loss.mean()), abs_tol=1e-4
        ),
    }
    return conclude("quantisation", values, relations)


def of_errors(
    shape: Mapping[str, Mapping[str, float]], blocks: Mapping[str, Sequence[float]]
) -> dict[str, bool]:
    """The relations that are asserted of the matrices."""
    bells = [shape["Gaussian"], shape["Student t5"]]
    return {
        "error, bell-shaped weights: NF4+DQ < Int4 < FP4": all(
            1.02 * e["NF4+DQ"] < e["Int4"] and 1.02 * e["Int4"] < e["FP4"] for e in bells
        ),
        "error, uniform weights: Int4 < NF4+DQ": 1.1 * shape["uniform"]["Int4"]
        < shape["uniform"]["NF4+DQ"],
        "error: double quantisation adds less than 1 %": all(
            e["NF4+DQ"] < 1.01 * e["NF4"] for e in shape.values()
        ),
        "error: grows with the block, in every format": all(
            list(found) == sorted(found) for found in blocks.values()
        ),
    }


def of_models(read: Mapping[str, Read]) -> dict[str, bool]:
    """The relations that are asserted of the language model."""
    ours, whole = read["NF4+DQ"], read["float32"]
    return {
        "loss: float32 < NF4+DQ": apart(ours.loss, whole.loss),
        "loss: double quantisation costs less than a tenth of what NF4 costs": abs(
            float((ours.loss - read["NF4"].loss).mean())
        )
        < 0.1 * float((ours.loss - whole.loss).mean()),
        **{
            f"divergence: NF4+DQ < {name}": apart(read[name].divergence, ours.divergence)
            for name in ("Int4", "FP4", WIDE)
        },
    }


if __name__ == "__main__":
    sys.exit(main())
