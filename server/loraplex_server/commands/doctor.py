"""`loraplex-server doctor`: checks of the machine and of the settings."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from loraplex_adapters.store import survey_at
from loraplex_model.base.info import public_name
from loraplex_model.base.refusal import Refusal

from loraplex_server.access.identity.directory import open_directory
from loraplex_server.access.identity.server_certificate import CertificateFiles, date
from loraplex_server.commands import doctor_base, doctor_cuda
from loraplex_server.commands.checks import Check
from loraplex_server.config import Config, available_cores
from loraplex_server.engine.runner.config import CPU_KV_BYTES
from loraplex_server.registry.census import troubles
from loraplex_server.runtime.failures import for_operator
from loraplex_server.runtime.process_memory import meminfo_bytes

_SHOWN: Final = 5


def examine(config: Config, adapters: Sequence[Path] = ()) -> Iterator[Check]:
    """Checks everything that serving needs, without converting a model or changing a file.

    `adapters` are directories of adapters that are checked against the base model, with those that
    the settings name.
    """
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    yield Check("processor", f"{_processor()}, {available_cores()} cores, {_memory()}")
    yield from _arithmetic(config)
    named = [each.path for each in config.adapters]
    yield from doctor_base.examine(config, [*adapters, *named], _memory_bytes())
    yield from _end_tokens(config)
    yield from _base_cache(config)
    for name in ("store", "cache"):
        yield _folder(name, getattr(config, name), writable=True)
    if config.import_root.exists() or config.makes_import_root:
        yield _folder("import_root", config.import_root, writable=False)
    else:
        text = "no such directory; create it, or correct --import-root"
        yield Check("import_root", f"{config.import_root}: {text}", good=False)
    if config.adapter_directory is not None:
        place = config.adapter_directory
        text = f"{place}: not a directory; create it, or correct --adapter-directory"
        is_there = place.is_dir()
        yield _folder("directory", place, False) if is_there else Check("directory", text, False)
    yield from _adapters(config)
    yield from _callers(config)
    yield from _certificate(config)
    yield _port("grpc port", config.host, config.port)
    yield _port("admin port", config.admin_host, config.admin_port)


def _callers(config: Config) -> Iterator[Check]:
    """Who may call: the files of principals and their credentials."""
    try:
        known = open_directory(config)
    except Refusal as error:
        for problem in error.problems:
            yield Check("principals", f"{problem.field}: {problem.message}", good=False)
        return
    if known is None:
        yield Check("principals", "none; callers are not authenticated")
    else:
        yield Check("principals", f"{len(known.principals)} in {config.principals}")


def _arithmetic(config: Config) -> Iterator[Check]:
    try:
        import torch
    except ImportError:
        yield Check(
            "torch", "not installed; install it with: pip install 'loraplex[server]'", good=False
        )
        return
    from loraplex_model.ops import build, known_faults
    from loraplex_model.ops.devices import resolve

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    chosen = resolve(config.engine_device).type if cuda else "cpu"
    possible = config.device != "cuda" or cuda
    yield Check("torch", f"{torch.__version__}, {gpus[0] if gpus else 'no CUDA device'}")
    if config.placements:
        yield from _engines(config, gpus)
    else:
        yield Check("device", f"{chosen} (--device {config.device})", possible)
    try:
        known_faults.check(chosen)
        yield Check("packages", f"no known fault that matters on {chosen}")
    except Refusal as error:
        yield from (Check("packages", problem.message, False) for problem in error.problems)
    isas = build.supported_isas()
    try:
        best = build.chosen_isa()
        yield Check("instructions", f"supported by this processor: {', '.join(isas)}")
    except Refusal as error:
        best = isas[0]
        yield Check("instructions", error.message, good=False)
    compiler = _compiler()
    yield Check("compiler", compiler or "not found")
    builds = build.builds(best, directory=config.cache / "kernels")
    built = next(filter(build.is_whole, builds), None)
    for damaged in builds:
        if not build.is_whole(damaged):
            text = "damaged or incomplete" + ("; built again at the next start" if compiler else "")
            yield Check("kernels", f"{damaged.parent}: {text}", good=False)
    if chosen == "cuda":
        for subject, words in doctor_cuda.examine(config.cache, config.dtype):
            yield Check(subject, words)
        return
    why = "the fastest supported" if best == isas[0] else "as LORAPLEX_ISA says"
    if built is not None:
        text = f"C++ for {best}, {why}; built in {built.parent}"
    elif compiler:
        text = f"C++ for {best}, {why}; will be compiled at the first start"
    else:
        text = "torch reference, many times slower; the C++ kernels need a compiler (g++)"
    yield Check("kernels", text)


def _engines(config: Config, gpus: Sequence[str]) -> Iterator[Check]:
    """The device of each of several engines, and their memory; `gpus` are the names of all GPUs."""
    for placement in config.placements:
        if placement.kind == "cpu":
            yield Check(
                "device", f"{placement.name}: an engine, CPU threads: {config.engine_threads}"
            )
        elif placement.number < len(gpus):
            yield Check("device", f"{placement.name}: an engine on {gpus[placement.number]}")
        else:
            text = f"{placement.name}: no such GPU; CUDA finds {len(gpus)} (--devices)"
            yield Check("device", text, good=False)
    budgets = int(config.host_adapter_memory)
    if config.engine_device == "cpu":
        budgets += config.kv_memory or CPU_KV_BYTES
        budgets += config.adapter_memory + config.merge_memory
    needed, there = config.engine_count * budgets, _memory_bytes()
    text = f"the budgets of {config.engine_count} engines are {needed / 1e9:.1f} GB together"
    yield Check("memory", f"{text}, of {there / 1e9:.1f} GB", not there or needed <= there)


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "c++"))
    if path is None:
        return ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return f"{path}: {said.stdout.partition(chr(10))[0]}"


def _end_tokens(config: Config) -> Iterator[Check]:
    """The tokens that end an answer of the configured base, if it has been converted."""
    try:
        from loraplex_model.checkpoints.load import known_end_tokens

        tokens = known_end_tokens(config.model, config.cache)
    except ImportError:
        return  # other checks report it
    except Refusal as refusal:
        yield Check("end tokens", for_operator(refusal), good=False)
        return
    if tokens is not None:
        named = ", ".join(f"{token.token_id} {token.text}".rstrip() for token in tokens)
        text = named or "none; answers end at stop strings and at their length only"
        yield Check("end tokens", text)


def _adapters(config: Config) -> Iterator[Check]:
    """Looks at the store's index, if there is one, and for the files that it names."""
    url = config.store_url.get_secret_value()
    if not url and not (config.store / "index.sqlite3").exists():
        return
    try:
        found = survey_at(config.store, url)
    except Refusal as refusal:
        yield Check("adapters", for_operator(refusal), good=False)
        return
    if found is None:
        yield Check("adapters", "the index will be brought up to date at the next start")
        return
    held = [each.id for each in found if each.is_quarantined]
    fingerprint = _fingerprint(config)
    text = "" if fingerprint else "; their base is compared once the model is converted"
    yield Check("adapters", f"{len(found)} versions in use, {len(held)} quarantined{text}")
    for _, trouble, ids in troubles(found, public_name(config.model), fingerprint):
        shown = ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
        yield Check("adapters", f"{len(ids)} {trouble}: {shown}", good=False)


def _fingerprint(config: Config) -> str:
    """The fingerprint of the configured base; "" if it is not known without converting the base."""
    try:
        from loraplex_model.checkpoints.load import known_fingerprint

        return known_fingerprint(config.model, config.cache)
    except (ImportError, Refusal):
        return ""  # other checks report it


def _base_cache(config: Config) -> Iterator[Check]:
    """Reads every converted model, and the default one's source, and compares their digests."""
    from loraplex_model.checkpoints import cache, default_model

    entries = [path.parent for path in sorted(config.cache.glob(f"entries/*/{cache.ENTRY}"))]
    whole = [entry for entry in entries if cache.is_whole(entry, digests=True)]
    for entry in entries:
        if entry not in whole:
            yield Check("base cache", f"{entry}: damaged; built again at its next use", good=False)
    source = default_model.path_in(config.cache)
    if source.exists() and not default_model.is_pinned(source, digest=True):
        yield Check("base cache", f"{source}: damaged; fetched again when needed", good=False)
    elif whole or not entries:
        yield Check("base cache", f"{len(whole)} converted models with the right digests")


def _certificate(config: Config) -> Iterator[Check]:
    """The certificate of the gRPC ports, if connections are encrypted."""
    files, now = CertificateFiles.of(config), time.time()
    if files is None:
        return
    try:
        found = files.check(files.read(), now)
    except Refusal as refusal:
        yield Check("certificate", refusal.message, good=False)
        return
    yield Check("certificate", f"expires on {date(found.expires)}")
    for text in files.warnings(found, now):
        yield Check("certificate", text)


def _folder(name: str, path: Path, writable: bool) -> Check:
    if path.is_dir():
        mode = os.R_OK | os.X_OK | (os.W_OK if writable else 0)
        if os.access(path, mode):
            return Check(name, f"{path}, {shutil.disk_usage(path).free / 1e9:.1f} GB free")
        return Check(name, f"{path}: no permission", good=False)
    if path.exists():
        return Check(name, f"{path}: not a directory", good=False)
    parent = next(p for p in path.absolute().parents if p.exists())
    good = os.access(parent, os.W_OK | os.X_OK)
    return Check(name, f"{path}: will be created" if good else f"{path}: cannot be created", good)


def _port(name: str, host: str, port: int) -> Check:
    if port == 0:
        return Check(name, f"{host}, any free port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check(name, f"{host}:{port}: {error.strerror}", good=False)
    return Check(name, f"{host}:{port} is free")


def _processor() -> str:
    return _read_field("/proc/cpuinfo", "model name") or platform.processor() or sys.platform


def _memory() -> str:
    there = _memory_bytes()
    return f"{there / 1e9:.1f} GB memory" if there else "memory unknown"


def _memory_bytes() -> int:
    """Memory of the machine in bytes; 0 if unknown."""
    return meminfo_bytes("MemTotal")


def _read_field(path: str, name: str) -> str:
    def matches(line: str) -> bool:
        return line.partition(":")[0].strip() == name

    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next(filter(matches, lines), "").partition(":")[2].strip()
