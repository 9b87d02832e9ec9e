"""DoRA (arXiv 2402.09353): the direction and the length of every row of W are trained separately.

    y = m / |W + s B A| * (W x + s B A x) + bias,    norms of rows, not differentiated (section 4.3)

W is the base as it is served, unpacked from NF4. m starts as the norms themselves, so an untrained
adapter changes nothing. Dropout acts on A's inputs alone; PEFT's reaches W x, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from loraplex_model.adapters.delta import AdapterDelta, LoraFactors, ProjectionDelta
from loraplex_model.adapters.merge import own_bias
from loraplex_model.base.config import Site

from loraplex_training.methods.base import AdapterFiles, ParameterGroup, Setting, TrainedAdapter
from loraplex_training.methods.lora import LoraAdapter, LoraOptions, make_lora
from loraplex_training.methods.options import OptionProblems
from loraplex_training.methods.plain import divided, leaf, stored, tensor_name
from loraplex_training.methods.targets import weight


def dora(options: LoraOptions, setting: Setting, problems: OptionProblems) -> TrainedAdapter:
    """LoRA with a trained length of every row of the changed weights.

    With `loraplus_lr_ratio` the lengths have B's learning rate, as with PEFT's optimiser. Saved as
    PEFT's LORA with use_dora.
    """
    return DoraAdapter(setting, make_lora(options, setting, problems), options.loraplus_lr_ratio)


class DoraAdapter(TrainedAdapter):
    """A `TrainedAdapter` of a LoRA's A and B and of magnitudes.

    `rate` is the learning rate of the magnitudes divided by that of A.
    """

    def __init__(self, setting: Setting, pairs: LoraAdapter, rate: float) -> None:
        self._setting, self._pairs, self._rate = setting, pairs, rate
        self._norms: dict[Site, tuple[tuple[int, ...], torch.Tensor]] = {}
        self._magnitudes = {
            self._name(site): leaf(self._norms_of(site, pairs.at(site)), setting.base)
            for site in pairs.ranks
        }
        self.parameters: Mapping[str, torch.Tensor] = {**pairs.parameters, **self._magnitudes}
        self.dropout = pairs.dropout

    def groups(self) -> Sequence[ParameterGroup]:
        """See `TrainedAdapter`. Magnitudes have no weight decay, which would shorten all rows."""
        magnitudes = ParameterGroup(tuple(self._magnitudes), self._rate, decay=False)
        return [*self._pairs.groups(), magnitudes]

    def delta(self) -> AdapterDelta:
        """See `TrainedAdapter`. Unpacks every adapted matrix, if its A or B has changed since."""
        changes = {site: self._change(site) for site in self._pairs.ranks}
        return divided(changes, self._setting.base)

    def stepped(self, step: int) -> None:
        """Drops the norms, which the step has changed."""
        self._norms.clear()

    def state(self) -> Mapping[str, torch.Tensor]:
        """See `TrainedAdapter`."""
        return self._pairs.state()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `TrainedAdapter`."""
        super().restore(state)
        self._norms.clear()

    def files(self) -> AdapterFiles:
        """See `TrainedAdapter`."""
        files = self._pairs.files()
        magnitudes = {name: stored(tensor) for name, tensor in self._magnitudes.items()}
        return AdapterFiles({**files.config, "use_dora": True}, {**files.tensors, **magnitudes})

    def _change(self, site: Site) -> ProjectionDelta:
        factors = self._pairs.at(site)
        gain = self._magnitudes[self._name(site)] / self._norms_of(site, factors)
        base_bias = own_bias(self._setting.base, site)
        return ProjectionDelta(
            a=factors.a,
            b=factors.b.T * (factors.scale * gain),
            gain=gain,
            bias=None if base_bias is None else base_bias.to(gain.dtype) * (1 - gain),
        )

    def _norms_of(self, site: Site, factors: LoraFactors) -> torch.Tensor:
        """Returns |W + s B A| of every row, not differentiated; cached until A or B changes."""
        # Optimisers that bypass torch's version counters are covered by `stepped`.
        versions = tuple(
            self._pairs.parameters[name]._version for name in self._pairs.names_of(site)
        )
        kept = self._norms.get(site)
        if kept is not None and kept[0] == versions:
            return kept[1]
        a, b = factors.a.detach(), factors.b.detach()
        whole = weight(self._setting.base, site).to(a.dtype).addmm_(b, a, alpha=factors.scale)
        norms: torch.Tensor = torch.linalg.vector_norm(whole, dim=1)
        self._norms[site] = versions, norms
        return norms

    def _name(self, site: Site) -> str:
        return tensor_name(self._setting.base, site, "lora_magnitude_vector")
