"""Finds out why a folder does not hold a PEFT adapter, from file names and first bytes.

The packages `loraplex` (the client) and `loraplex_adapters` each have a copy of this module, since
neither imports the other. A test compares the copies. The module needs the standard library only
and never opens a file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

HEAD_BYTES = 512
"""Bytes at the beginning of a file by which its kind is recognised."""

INVALID, UNSUPPORTED = "ADAPTER_INVALID", "ADAPTER_UNSUPPORTED"

# Of a finding: its reason, its message, and the file or folder that it is about.
Cause = tuple[str, str, str]

# Lists a folder below the given one ("" is the folder itself): names, and which are folders.
Listing = Callable[[str], Sequence[tuple[str, bool]]]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OF_A_RUN = ("training_args.", "optimizer.", "scheduler.", "rng_state", "scaler.")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_DEPTH, _MOST_FOLDERS, _SHOWN = 3, 200, 3
_SAVE = "save_pretrained of PEFT writes it"
CONVERT = "the server's operator can convert it: loraplex-server store import --convert"


def cause_of(listing: Listing) -> Cause | None:
    """Why the folder lacks a file of an adapter; None if it has both."""
    entries = listing("")
    files = sorted(name for name, is_folder in entries if not is_folder)
    has_config, has_weights = _CONFIG in files, _WEIGHTS in files
    if has_config and has_weights:
        return None
    if not has_config and (below := _adapters_below(listing, entries)):
        return INVALID, _nested(below, has_weights), shown(below[0])
    if has_weights:
        text = f"there is no {_CONFIG}, only the weights; copy it from the run's folder: {_SAVE}"
        return INVALID, text, _CONFIG
    return _other_weights(files) or _nothing(files, has_config)


def cause_in(head: bytes, name: str, *, text: bool = False) -> Cause | None:
    """Why the first bytes of a file do not fit its `name`; None if nothing is wrong.

    `text` is True for a file of text, such as the configuration.
    """
    if not head:
        return INVALID, f"{name} is empty; copy or download it again", name
    if not text and head[8:9] == b"{":
        return None  # a safetensors header, whose length can look like another program's mark
    begins = head.lstrip()[:64].lower()
    if head.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer and not the file itself; run `git lfs pull` in the repository"
        return INVALID, f"{name} {what}, or download the file", name
    if begins.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page, as servers send instead of a file that needs a login"
        return INVALID, f"{name} {what}; download it again", name
    if text:
        return None
    if head.startswith(b"GGUF"):
        return UNSUPPORTED, f"{name} is a GGUF file; {_GGUF}", name
    if head.startswith(b"\x1f\x8b"):
        return INVALID, f"{name} is compressed (gzip); unpack it", name
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        what = f"is a pickle, not safetensors; {pickle_advice(name)}"
        return UNSUPPORTED, f"{name} {what}", name
    if len(head) >= 8 and head[:8].isascii() and head[:8].decode().isprintable():
        what = f'is text and not weights: it begins with "{shown(head[:32].decode("latin-1"))}"'
        return INVALID, f"{name} {what}; download it again", name
    return None


def pickle_advice(name: str) -> str:
    """How to turn pickled weights into safetensors where the pickle is trusted."""
    source = name if name.endswith(_PICKLES) else "adapter_model.bin"
    code = (
        "import torch, safetensors.torch as s; "
        f"w = torch.load('{shown(source)}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in w.items()}}, '{_WEIGHTS}')"
    )
    return (
        "save with safe_serialization=True (PEFT's save_pretrained), or convert it where it is: "
        f'python -c "{code}"'
    )


def shown(name: str) -> str:
    """A name or a text as printable ASCII, cut to 120 characters."""
    plain = name if name.isascii() and name.isprintable() else ascii(name)[1:-1]
    return plain if len(plain) <= 120 else plain[:117] + "..."


_GGUF = "the server reads PEFT adapters: give the one that it was converted from"


def _adapters_below(listing: Listing, entries: Iterable[tuple[str, bool]]) -> list[str]:
    """Paths of folders below that have a configuration, those of the last training step first."""
    found: list[str] = []
    level = [name for name, is_folder in entries if is_folder and not name.startswith(".")]
    seen = 0
    for _ in range(_DEPTH):
        deeper: list[str] = []
        for path in sorted(level, key=_by_number):
            seen += 1
            if seen > _MOST_FOLDERS:
                return found
            inside = listing(path)
            if (_CONFIG, False) in inside:
                found.append(path)
            deeper += [f"{path}/{name}" for name, is_folder in inside if is_folder]
        level = deeper
    return found


def _by_number(path: str) -> tuple[int, str]:
    digits = path[len(path.rstrip("0123456789")) :][-18:]
    return -int(digits) if digits.isascii() and digits else 0, path


def _nested(below: Sequence[str], has_weights: bool) -> str:
    names = ", ".join(f"{shown(path)}/" for path in below[:_SHOWN])
    if len(below) == 1:
        where = f"but there is an adapter in {names}; give that folder"
    else:
        more = f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
        where = f"but there are adapters in {names}{more}; give one of these folders"
    which = f"there is no {_CONFIG} in this folder" + (" next to the weights" * has_weights)
    return f"{which}, {where}"


def _other_weights(files: Sequence[str]) -> Cause | None:
    """The cause where the folder has weights that are not PEFT's, or not named as PEFT's."""
    weights = [name for name in files if name.endswith(".safetensors")]
    pickles = [n for n in files if n.endswith(_PICKLES) and not n.startswith(_OF_A_RUN)]
    pickles.sort(key=lambda name: (not name.startswith("adapter_model"), name))
    model = [n for n in files if n.startswith(("model", "pytorch_model", "consolidated"))]
    model = [n for n in model if n.endswith((".safetensors", ".bin", ".pth"))]
    if "adapters.safetensors" in files:
        text = f"the folder holds an adapter of MLX (adapters.safetensors), not of PEFT; {CONVERT}"
        return UNSUPPORTED, text, "adapters.safetensors"
    if "lora.safetensors" in files:
        text = "the folder holds an adapter of mistral-finetune (lora.safetensors), not of PEFT; "
        return UNSUPPORTED, text + CONVERT, "lora.safetensors"
    if shards := [n for n in weights if n.startswith("adapter_model-")]:
        text = f"the weights are in {len(shards)} files ({shown(shards[0])}); {CONVERT}, or save "
        return UNSUPPORTED, f"{text}them as one {_WEIGHTS} with a larger max_shard_size", shards[0]
    if "adapter.safetensors" in files:
        text = "the folder holds an adapter of AdapterHub (adapter.safetensors); the server's "
        text += "operator can convert it: loraplex-server convert --from adapterhub"
        return UNSUPPORTED, text, "adapter.safetensors"
    if model and ("config.json" in files or _CONFIG not in files):
        text = f"the folder holds a whole model ({shown(model[0])}), not an adapter; give the "
        text += "folder that PEFT's save_pretrained wrote before merging, or serve it with --model"
        return UNSUPPORTED, text, shown(model[0])
    if pickles:
        text = f"the weights are pickled ({shown(pickles[0])}); {pickle_advice(pickles[0])}"
        return UNSUPPORTED, text, shown(pickles[0])
    if ggufs := [name for name in files if name.endswith(".gguf")]:
        return UNSUPPORTED, f"{shown(ggufs[0])} is a file of llama.cpp; {_GGUF}", shown(ggufs[0])
    if weights:
        text = f"there is no {_WEIGHTS}, but {shown(weights[0])}; rename it if it is the adapter"
        return INVALID, text, shown(weights[0])
    return None


def _nothing(files: Sequence[str], has_config: bool) -> Cause:
    """The cause where the folder has no weights at all."""
    if packed := [name for name in files if name.endswith(_ARCHIVES)]:
        return INVALID, f"{shown(packed[0])} is an archive; unpack it", shown(packed[0])
    if has_config:
        text = f"there is no {_WEIGHTS}, only the configuration; {_SAVE}"
        return INVALID, text, _WEIGHTS
    holds = f"; it holds {shown(files[0])}" if files else "; it is empty"
    more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    text = f"there is no {_CONFIG} and no {_WEIGHTS} in the folder{holds}{more}"
    return INVALID, text, _CONFIG
