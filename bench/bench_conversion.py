"""Memory and time of converting a base model to NF4, over synthetic checkpoints of several sizes.

    python bench/bench_conversion.py [--layers 2 4 6 8] [--hidden 2048] [--gguf] [--torch]

Each checkpoint, random bfloat16 in the shape of a Llama, or Q8_0 in a GGUF file, is written to a
temporary folder and loaded by a process of its own, which converts it: hashing, reading,
quantising, writing, hashing and mapping of the result. The files are in the page cache, so the time
has no reading from a disk.

Memory is the anonymous memory of that process (RssAnon in /proc/PID/status), libraries included,
looked at every two milliseconds. Mapped pages of the checkpoint and of the stored model (RssFile)
do not count: they are page cache, which the system takes back when it needs memory.

A line is fitted to the peaks over the sizes in NF4, and one to the times over the sizes of the
checkpoints. Every peak must be below NF4 + the largest tensor + 1 GB, else the exit code is 1. The
last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.checkpoints.checkpoint import open_source
from loraplex_model.checkpoints.conversion.survey import survey
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.ops import build
from report import json_line, table

VOCAB = 32_000
HEAD = 64
ALLOWANCE = 1e9
"""Bytes of memory beyond the model in NF4 and one tensor."""
POLL_SECONDS = 0.002
_BLOCKS = ("self_attn",) * 4 + ("mlp",) * 3


def shapes(hidden: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors; the MLP is four times as wide as the model."""
    yield "model.embed_tokens.weight", (VOCAB, hidden)
    yield "model.norm.weight", (hidden,)
    wide, square = 4 * hidden, (hidden, hidden)
    sizes = (square,) * 4 + ((wide, hidden), (wide, hidden), (hidden, wide))
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (hidden,)
        for block, name, size in zip(_BLOCKS, PROJECTIONS, sizes, strict=True):
            yield f"{at}{block}.{name}.weight", size


def write(directory: Path, hidden: int, layers: int) -> int:
    """Writes a checkpoint, and returns the bytes of its largest tensor."""
    directory.mkdir()
    heads = hidden // HEAD
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    chance, largest = torch.Generator().manual_seed(0), 0
    with SafetensorsFile(directory / "model.safetensors", 2 + 9 * layers, {}) as file:
        for name, shape in shapes(hidden, layers):
            values = (0.02 * torch.randn(shape, generator=chance)).bfloat16()
            largest = max(largest, values.nbytes)
            file.add(name, values)
    return largest


def write_gguf(path: Path, hidden: int, layers: int) -> int:
    """Writes a GGUF file, and returns the bytes of its largest tensor in float32."""
    import gguf
    from gguf.quants import quantize

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(2048)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(4 * hidden)
    writer.add_head_count(hidden // HEAD)
    writer.add_head_count_kv(hidden // HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    chance, made = np.random.default_rng(0), {}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes(hidden, layers):
        if shape not in made:
            values = 0.02 * chance.standard_normal(shape, np.float32)
            made[shape] = quantize(values, kind) if len(shape) > 1 else values
        own = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(own, made[shape], raw_dtype=kind if len(shape) > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return max(4 * int(np.prod(shape)) for shape in made)


def convert(directory: Path, cache: Path, environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak of anonymous memory, in bytes, of a process that loads a checkpoint."""
    command = [sys.executable, __file__, "--load", str(directory), str(cache)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        peak, status = 0, Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            peak = max(peak, anonymous(status.read_text()))
            time.sleep(POLL_SECONDS)
        assert child.stdout is not None
        said = child.stdout.read()
    if child.returncode:
        sys.exit(f"error: the conversion ended with status {child.returncode}")
    return float(said), peak


def anonymous(status: str) -> int:
    """RssAnon of the text of /proc/PID/status in bytes; 0 for a process that has ended."""
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def load(directory: str, cache: str) -> None:
    """Loads a checkpoint into a new cache, and prints the seconds. Imports are not measured."""
    from loraplex_model.checkpoints.load import load_base
    from loraplex_model.ops.quiet import quieten_bitsandbytes
    from transformers import CONFIG_MAPPING

    quieten_bitsandbytes()
    import bitsandbytes.functional  # noqa: F401

    CONFIG_MAPPING["llama"]
    begin = time.perf_counter()
    load_base(directory, torch.bfloat16, Path(cache))
    print(time.perf_counter() - begin)


def measure(hidden: int, counts: Sequence[int], is_gguf: bool, environment: dict[str, str]) -> bool:
    """Converts models of these numbers of layers, prints the results; True if all are in bounds."""
    rows, largest = [], 0
    with tempfile.TemporaryDirectory(prefix="conversion-") as folder:
        for layers in counts:
            model = Path(folder) / (f"{layers}.gguf" if is_gguf else f"{layers}")
            largest = (write_gguf if is_gguf else write)(model, hidden, layers)
            found = survey(open_source(model))
            seconds, peak = convert(model, Path(folder) / "cache", environment)
            bound = found.stored_bytes + largest + ALLOWANCE
            sizes = found.nbytes / 1e9, found.stored_bytes / 1e9
            rows.append((layers, *sizes, peak / 1e9, bound / 1e9, seconds))
            for file in (model,) if is_gguf else model.iterdir():
                file.unlink()
    head = ("layers", "checkpoint GB", "NF4 GB", "peak GB", "bound GB", "s")
    print(table(head, rows))
    _, source, stored, peaks, bounds, times = (list(column) for column in zip(*rows, strict=True))
    slope, intercept = np.polyfit(stored, peaks, 1)
    per_gb, _ = np.polyfit(source, times, 1)
    within = all(peak < bound for peak, bound in zip(peaks, bounds, strict=True))
    print(
        json_line(
            {
                "peak_gb_per_nf4_gb": float(slope),
                "peak_gb_of_nothing": float(intercept),
                "largest_tensor_gb": largest / 1e9,
                "peaks_gb": peaks,
                "within_bound": within,
                "seconds_per_gb": float(per_gb),
                "threads": torch.get_num_threads(),
                "kernels": environment["LORAPLEX_KERNELS_DIR"] and build.chosen_isa(),
            }
        )
    )
    return within


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--gguf", action="store_true", help="GGUF files in Q8_0")
    parser.add_argument("--torch", action="store_true", help="quantise without the C++ kernels")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(*args.load)
        return
    environment = dict(os.environ) | {"LORAPLEX_KERNELS_DIR": ""}
    if args.torch:
        environment["CXX"] = "no-compiler"
    else:
        kernels = build.compile_kernels(build.chosen_isa())
        environment["LORAPLEX_KERNELS_DIR"] = str(kernels.parents[1])
    if not measure(args.hidden, args.layers, args.gguf, environment):
        sys.exit("error: a peak is above NF4 + the largest tensor + 1 GB")


if __name__ == "__main__":
    main()
