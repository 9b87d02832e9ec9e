"""LoRA factors as an adapter for llama.cpp, in one GGUF file.

llama.cpp adds alpha / rank * B (A x) at every tensor for which the file has `.lora_a` and
`.lora_b`; the rank is that of the tensor, alpha is one number for the file. So alpha is the most
common rank, and B contains the rest of the scale if a module has another rank. Files of the "llama"
architecture have the rows of q and k in another order, and hence those of B. A of the token
embedding is transposed, since it is read row by row.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from loraplex_model.base import families
from loraplex_model.base.config import MODEL, DecoderConfig, Site
from loraplex_model.base.families import FAMILIES
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.gguf.names import GgufNames

from loraplex_adapters.convert.export.factors import Factors, FactorsBySite
from loraplex_adapters.format.modules import EMBEDDING

FILE = "adapter.gguf"


def write_gguf(
    target: Path,
    factors: FactorsBySite,
    config: DecoderConfig,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Creates the directory `target` with `adapter.gguf` in it.

    `dtype` is float32, float16 or bfloat16. Raises Refusal(EXPORT_UNSUPPORTED) for changes of tied
    embeddings or head, for which llama.cpp has one name and which it does not apply correctly.
    """
    from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType
    from gguf.constants import GGML_QUANT_VERSION, Keys

    shared = [name for layer, name in factors if layer == MODEL]
    if config.tie_embeddings and shared:
        message = f"llama.cpp cannot adapt {shared[0]}, because the base ties embeddings and head"
        raise Refusal(Reason.EXPORT_UNSUPPORTED, message, "format")
    kinds = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    kind, file_type = kinds[dtype]
    alpha = Counter(found.rank for found in factors.values()).most_common(1)[0][0]
    architecture = FAMILIES[config.architecture].gguf
    if not architecture:
        message = f"llama.cpp has no architecture for {config.architecture}"
        raise Refusal(Reason.EXPORT_UNSUPPORTED, message, "format")
    names = GgufNames(architecture, config.num_layers)
    places = {site: tensor_name(site, config.architecture, names) for site in factors}
    target.mkdir()
    writer = GGUFWriter(target / FILE, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for site, found in factors.items():
        at = places[site]
        a, b = _as_stored(site, found, config, alpha)
        for ending, tensor in (("lora_a", a), ("lora_b", b)):
            values = tensor.to(dtype).contiguous()
            if dtype == torch.bfloat16:
                raw = values.view(torch.uint8).numpy()
                writer.add_tensor(f"{at}.{ending}", raw, raw_dtype=kind)
            else:
                writer.add_tensor(f"{at}.{ending}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_name(site: Site, architecture: str, names: GgufNames) -> str:
    """Name of a module's weight in llama.cpp."""
    layer, name = site
    if layer == MODEL:
        ours = {"embed_tokens": families.EMBED, "lm_head": families.LM_HEAD}[name]
    else:
        ours = families.tensor_name(architecture, layer, name)
    theirs = names.of(ours)
    if theirs is None:
        raise Refusal(Reason.EXPORT_UNSUPPORTED, f"llama.cpp has no name for {ours}", "format")
    return theirs


def _as_stored(
    site: Site, factors: Factors, config: DecoderConfig, alpha: int
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors.a, factors.b
    if factors.rank != alpha:
        b = b * (factors.rank / alpha)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    if site[1] in heads and FAMILIES[config.architecture].gguf_interleaved:
        b = _interleaved(b, heads[site[1]])
    return (a.T if site == EMBEDDING else a), b


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in llama.cpp's order: within a head (2, pair) becomes (pair, 2)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
