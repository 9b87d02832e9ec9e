"""DoRA (arXiv 2402.09353): direction and length of every row of W are trained apart.

    y = m / |W + s B A| * (W x + s B A x) + bias,    norms of rows, not differentiated (section 4.3)

W is the base as it is served, unpacked from NF4. m starts as the norms themselves, so the start
adds nothing. Where PEFT's dropout reaches W x too, ours acts on A's inputs alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_model.adapters.delta import AdapterDelta, LoraFactors, SiteDelta
from loraplex_model.base.config import Site

from loraplex_training.methods.base import (
    AdapterFiles,
    Observe,
    ParameterGroup,
    Setting,
    TrainedAdapter,
)
from loraplex_training.methods.initial import read_initialisation
from loraplex_training.methods.lora import Pairs, Recipe, names_of, read_recipe, stored
from loraplex_training.methods.options import Options
from loraplex_training.methods.plain import leaf
from loraplex_training.methods.targets import bias, weight


def dora(options: Options, setting: Setting) -> TrainedAdapter:
    """PEFT's LORA with use_dora; the options of `lora`.

    With `loraplus_lr_ratio` magnitudes learn as fast as B, as they do with PEFT's optimiser.
    """
    recipe = read_recipe(options, setting)
    initialise = read_initialisation(
        options, recipe.init, setting.base, recipe.ranks, setting.generator
    )
    options.done()
    return DoraAdapter(setting, recipe, Pairs(setting.base, recipe, initialise))


class DoraAdapter:
    """A `TrainedAdapter`."""

    def __init__(self, setting: Setting, recipe: Recipe, pairs: Pairs) -> None:
        self._setting, self._recipe, self._pairs = setting, recipe, pairs
        self._norms: dict[Site, tuple[tuple[int, ...], torch.Tensor]] = {}
        self._magnitudes = {
            _name(site): leaf(self._norms_of(site, pairs.at(site)), setting.base)
            for site in recipe.ranks
        }
        self.parameters: Mapping[str, torch.Tensor] = {**pairs.parameters, **self._magnitudes}
        self.dropout = recipe.dropout
        self.settled = 0

    def prepare(self, observe: Observe) -> None:
        """Nothing is chosen from data."""

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`. Decay would make all rows shorter, so magnitudes are spared it."""
        magnitudes = ParameterGroup(tuple(self._magnitudes), self._recipe.ratio, decay=False)
        return [*self._pairs.groups(), magnitudes]

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`. Unpacks every adapted matrix, unless nothing has moved since."""
        return AdapterDelta({site: self._change(site) for site in self._recipe.ranks})

    def penalty(self) -> None:
        """There is none."""

    def stepped(self, step: int) -> None:
        """The norms are not those of before the step."""
        self._norms.clear()

    def state(self) -> Mapping[str, torch.Tensor]:
        """See `TrainedAdapter`."""
        return self._pairs.state()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `TrainedAdapter`."""
        self._pairs.restore(state)
        self._norms.clear()

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`."""
        magnitudes = {name: stored(tensor) for name, tensor in self._magnitudes.items()}
        config = self._pairs.config(self._setting, use_dora=True)
        return AdapterFiles(config, {**self._pairs.tensors(), **magnitudes})

    def _change(self, site: Site) -> SiteDelta:
        factors = self._pairs.at(site)
        gain = self._magnitudes[_name(site)] / self._norms_of(site, factors)
        base_bias = bias(self._setting.base, site)
        return SiteDelta(
            a=factors.a,
            b=factors.b.T * (factors.scale * gain),
            gain=gain,
            bias=None if base_bias is None else base_bias.to(gain.dtype) * (1 - gain),
        )

    def _norms_of(self, site: Site, factors: LoraFactors) -> torch.Tensor:
        """|W + s B A| of every row, a constant; kept until A or B has moved."""
        # Optimisers that write past torch's counters of changes are followed by `stepped`.
        versions = tuple(self._pairs.parameters[name]._version for name in names_of(site))
        kept = self._norms.get(site)
        if kept is not None and kept[0] == versions:
            return kept[1]
        a, b = factors.a.detach(), factors.b.detach()
        whole = weight(self._setting.base, site).to(a.dtype).addmm_(b, a, alpha=factors.scale)
        norms: torch.Tensor = torch.linalg.vector_norm(whole, dim=1)
        self._norms[site] = versions, norms
        return norms


def _name(site: Site) -> str:
    return f"{PREFIX}{module_path(*site)}.lora_magnitude_vector"
