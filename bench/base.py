"""Makes the default model available as a Hugging Face directory, for the compared programs.

    python bench/base.py

The directory is made once, below `var/`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

DEFAULT = Path("var/bench/base")
CACHE = Path("var/cache")


def ensure(directory: Path = DEFAULT, cache: Path = CACHE, dtype: str = "float32") -> Path:
    """Writes weights, configuration and tokenizer to `directory` unless they exist. Returns it.

    The weights are those of the default model's GGUF file, dequantised by transformers. `cache` is
    the server's cache.
    """
    if (directory / "config.json").exists():
        return directory
    import torch
    from loraplex_model.checkpoints.default_model import ensure_default_model
    from loraplex_model.ops.quiet import quieten_bitsandbytes
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quieten_bitsandbytes()
    gguf = ensure_default_model(cache)
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(ensure())
    sys.exit(0)
