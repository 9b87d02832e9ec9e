"""An adapter that is exported for llama.cpp changes a family's GGUF file as its base changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import test_gguf_families as cases
from gguf import GGUFReader
from loraplex_adapters.convert.export.factors import Factors
from loraplex_adapters.convert.export.gguf_adapter import FILE, write_gguf
from loraplex_model.base.config import Site
from loraplex_model.base.families import module_path
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import Refusal

from model import gguf_files

pytestmark = pytest.mark.slow

CASES = ("gemma3", "phi3", "smollm3", "granite", "olmo3", "glm", "glm4", "cohere2", "starcoder2",
         "stablelm", "ministral3", "ernie4_5", "mixtral")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_change_is_that_of_a_converted_base(case: str, tmp_path: Path) -> None:
    """The oracle converts the base with and without the change, as llama.cpp's converter does."""
    model = cases.built(case)
    config = decoder_config(model.config.to_dict())
    changed = copy.deepcopy(model)
    random = torch.Generator().manual_seed(5)
    factors: dict[Site, Factors] = {}
    for module, (fan_in, fan_out) in config.module_shapes().items():
        if config.num_experts and module not in ("q_proj", "k_proj", "v_proj", "o_proj"):
            continue
        a = torch.randn(3, fan_in, generator=random)
        factors[1, module] = found = Factors(a, torch.randn(fan_out, 3, generator=random))
        path = module_path(config.architecture, 1, module)
        changed.get_submodule(path).weight.data += found.dense()
    write_gguf(tmp_path / "out", factors, config, name="test")
    reader = GGUFReader(tmp_path / "out" / FILE)
    ours = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    before, after = gguf_files.converted(model), gguf_files.converted(changed)
    differing = {name for name in before if (before[name] != after[name]).any()}
    assert {name.rpartition(".")[0] for name in ours} == differing
    for name in differing:
        change = ours[f"{name}.lora_b"] @ ours[f"{name}.lora_a"]
        expected = torch.from_numpy(after[name] - before[name])
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)


def test_what_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    factors = {(0, "gate_proj"): Factors(torch.ones(1, 64), torch.ones(128, 1))}
    config = decoder_config(cases.built("mixtral").config.to_dict())
    helium = decoder_config(cases.of("helium", {"head_dim": 16}).config.to_dict())
    for base in (config, helium):
        with pytest.raises(Refusal, match=r"llama\.cpp has no") as caught:
            write_gguf(tmp_path / "out", factors, base, name="test")
        assert caught.value.reason == "EXPORT_UNSUPPORTED"
        assert not (tmp_path / "out").exists()
