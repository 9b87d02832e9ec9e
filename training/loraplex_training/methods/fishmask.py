"""FISH Mask (arXiv 2111.09839) on a base that is never written: a few entries of W are trained.

The entries are those with the most Fisher information, E[(dL/dW)^2] over some of the job's own
data. Their changes are trained; they lie in `rows` output rows of a module. These rows form A
[rows, in], mostly zeros, and B places them. So the file is a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.merge import fused_matrix
from loraplex_model.base.config import FUSED, Site
from loraplex_model.base.weights import BaseWeights, NF4Matrix
from loraplex_model.ops.linear import DequantisedLinear
from pydantic import Field

from loraplex_training.methods.base import AdapterFiles, Observe, Setting, TrainedAdapter
from loraplex_training.methods.lora import names_of
from loraplex_training.methods.options import OptionProblems, TargetOptions
from loraplex_training.methods.plain import config_of, divided, leaf, precision, stored
from loraplex_training.methods.targets import module_path, sites_of
from loraplex_training.spec.fields import Number, Positive

_MASK, _ROWS = "mask.", "rows."
_CHUNK = 1024  # rows of a gradient of W that are in memory at once

Look = Callable[[Site, torch.Tensor, torch.Tensor], None]
"""`(site, dy [T, out], x [T, in])` of a projection, called in its backward pass."""


class FishMaskOptions(TargetOptions):
    """Options of FISH Mask."""

    rows: Positive | None = None
    """Output rows of each module that may change. Default: 16, or all of a narrower module."""
    keep: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Fraction of these rows' entries that are trained."""
    samples: Positive = 16
    """Micro-batches from which the Fisher information is estimated."""


def fishmask(
    options: FishMaskOptions, setting: Setting, problems: OptionProblems
) -> TrainedAdapter:
    """A few entries of the weights, chosen by their Fisher information.

    Saved as PEFT's LORA of rank `rows`.
    """
    sites = sites_of(options, setting.base, problems)
    shapes = setting.base.config.module_shapes()
    narrowest = min((shapes[name][1] for _, name in sites), default=1)
    rows = min(16, narrowest) if options.rows is None else options.rows
    problems.at_most("rows", rows, min(narrowest, AdapterLimits().max_rank))
    problems.check()
    return FishMaskAdapter(setting, sites, rows, options)


class FishMaskAdapter(TrainedAdapter):
    """A `TrainedAdapter`. Before `prepare` or `restore` it trains no entries."""

    def __init__(
        self, setting: Setting, sites: Sequence[Site], rows: int, options: FishMaskOptions
    ) -> None:
        base, shapes = setting.base, setting.base.config.module_shapes()
        device = base.embed.device
        self._setting, self._sites, self._width, self._options = setting, sites, rows, options
        self._values = {site: leaf(torch.zeros(rows, shapes[site[1]][0]), base) for site in sites}
        self._masks = {
            site: torch.zeros(values.shape, dtype=torch.bool, device=device)
            for site, values in self._values.items()
        }
        self._rows = {site: torch.arange(rows, device=device) for site in sites}
        self.parameters: Mapping[str, torch.Tensor] = {
            names_of(base, site)[0]: values for site, values in self._values.items()
        }

    def prepare(self, observe: Observe) -> None:
        """Chooses the rows in one pass over the samples, and their entries in a second.

        Two passes need less memory: one number per row, then one per entry of the chosen rows.
        """
        by_row: dict[Site, torch.Tensor] = {}

        def sum_rows(site: Site, dy: torch.Tensor, x: torch.Tensor) -> None:
            parts = [(g @ x).square().sum(1) for g in torch.split(dy.T, _CHUNK)]
            by_row[site] = by_row.get(site, 0) + torch.cat(parts)

        observe(_Watched(self._setting.base, self._sites, sum_rows), self._options.samples)
        for site, sums in by_row.items():
            self._rows[site].copy_(sums.topk(self._width).indices.sort().values)

        by_entry: dict[Site, torch.Tensor] = {}

        def sum_entries(site: Site, dy: torch.Tensor, x: torch.Tensor) -> None:
            part = (dy[:, self._rows[site]].T @ x).square()
            by_entry[site] = by_entry.get(site, 0) + part

        observe(_Watched(self._setting.base, self._sites, sum_entries), self._options.samples)
        for site, sums in by_entry.items():
            count = max(1, round(self._options.keep * sums.numel()))
            self._masks[site].zero_().view(-1)[sums.view(-1).topk(count).indices] = True

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`. Entries outside the mask are zero and get no gradient."""
        changes = {
            site: ProjectionDelta(a=values * self._masks[site], b=self._places(site))
            for site, values in self._values.items()
        }
        return divided(changes, self._setting.base)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Returns the rows and the masks of the trained entries."""
        return {
            **{
                _ROWS + module_path(self._setting.base, site): rows
                for site, rows in self._rows.items()
            },
            **{
                _MASK + module_path(self._setting.base, site): mask
                for site, mask in self._masks.items()
            },
        }

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`."""
        tensors = {}
        for site, values in self._values.items():
            a, b = names_of(self._setting.base, site)
            tensors[a] = stored(values * self._masks[site])
            tensors[b] = stored(self._places(site).T)
        config = config_of(
            self._setting,
            "LORA",
            bias="none",
            fan_in_fan_out=False,
            init_lora_weights=True,
            lora_alpha=self._width,
            lora_dropout=0.0,
            r=self._width,
            target_modules=[self._path(site) for site in self._sites],
        )
        return AdapterFiles(config, tensors)

    def _path(self, site: Site) -> str:
        return module_path(self._setting.base, site)

    def _places(self, site: Site) -> torch.Tensor:
        """Returns B transposed, [rows, out], one-hot: the output row of each trained row."""
        fan_out = self._setting.base.config.module_shapes()[site[1]][1]
        ones = torch.nn.functional.one_hot(self._rows[site], fan_out)
        return ones.to(precision(self._setting.base))


class _Watched:
    """A `BaseLinear` that calls `look` with dy and x of the watched projections.

    The base has no trainable tensor, so an unused one makes torch run the backward pass.
    """

    def __init__(self, base: BaseWeights, sites: Sequence[Site], look: Look) -> None:
        watched = set(sites)
        self._product = DequantisedLinear()
        self._look = look
        self._parts: dict[int, list[Site | None]] = {}
        for index, layer in enumerate(base.layers):
            for fused in FUSED:
                matrix, _ = fused_matrix(layer, fused)
                found = [(index, name) for name in base.config.modules_of(fused)]
                self._parts[id(matrix)] = [site if site in watched else None for site in found]
        self._unused = torch.zeros((), requires_grad=True, device=base.embed.device)

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        y = self._product(matrix, x)
        shown: torch.Tensor = _Shown.apply(  # type: ignore[no-untyped-call]
            y, x.detach(), self._unused, lambda dy, own: self._show(matrix, dy, own)
        )
        return shown

    def _show(self, matrix: NF4Matrix, dy: torch.Tensor, x: torch.Tensor) -> None:
        parts = torch.split(dy, list(matrix.rows), dim=1)
        for site, part in zip(self._parts[id(matrix)], parts, strict=True):
            if site is not None:
                self._look(site, part, x)


class _Shown(torch.autograd.Function):
    """The identity, which calls `look` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        unused: torch.Tensor,
        look: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.look = look
        return y.clone()  # later operations may write in place, which a view forbids

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        with torch.no_grad():
            ctx.look(grads[0], *ctx.saved_tensors)
        return grads[0], None, None, None
