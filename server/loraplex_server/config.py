"""The server's settings; `config_sources` reads them."""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from loraplex_server import fair_weights
from loraplex_server.engine.batching.fair_queue import MAX_PRIORITY
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.shares import RESERVED
from loraplex_server.engine.group import devices
from loraplex_server.engine.group.devices import EnginePlacement
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.engine.process.pulse import BEAT_SECONDS
from loraplex_server.engine.process.setup import EngineSetup
from loraplex_server.engine.runner.config import CustomRunner, RunnerConfig

DEFAULT_MODEL: Final = "default"

Port = Annotated[int, Field(ge=0, le=65535)]
PathOrNone = Annotated[Path | None, BeforeValidator(lambda given: given or None)]  # "" is no path

PANELS: Final = {
    "model": "Model",
    "store": "Files",
    "host": "Network",
    "gpu_memory": "Memory",
    "max_rank": "Adapters",
    "max_context": "Requests",
    "training": "Training",
    "log_format": "Logging",
}
"""Titles of the panels of `--help`, each by its first setting in the order of `Config`."""


class Config(BaseSettings):
    """The server's settings. Sizes are bytes, or text such as "512MiB"; times are seconds.

    A field's docstring is the help of its flag. Fields with `repr=False` have no flag.
    """

    model_config = SettingsConfigDict(
        env_prefix="LORAPLEX_",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    model: str = Field(DEFAULT_MODEL, min_length=1)
    """Base model: a directory, a GGUF file or a hub id of a causal language model in Hugging Face
    format. `default` is SmolLM2-135M-Instruct."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. The base's weights are NF4 in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. `auto` uses CUDA if it is available."""
    devices: str = ""
    """Several devices, with an engine process for each: numbers of GPUs (0,1 or cuda:0,cuda:1), or
    cpu once for each engine; if empty, there is one engine on device. Budgets of memory and
    max_running are those of each engine."""
    threads: int = Field(0, ge=0)
    """CPU threads of the engine; 0 uses all cores that the process may use. Several engines on the
    CPU divide them among each other."""
    cuda_graphs: bool = True
    """On a GPU, capture the kernel launches of decode steps at start and replay each step as
    a whole (CUDA graphs). Without effect on a CPU."""

    store: Path = Path("var/store")
    """Directory of the adapter store, which holds the registered adapters."""
    store_url: SecretStr = SecretStr("")
    """PostgreSQL URL of the store's index, needed if several servers share the store; if empty, the
    index is an SQLite file in the store."""
    cache: Path = Path("var/cache")
    """Directory for quantised base models and compiled kernels."""
    import_root: Path = Path("var/import")
    """Directory below which clients may name files of the server: adapters and training data. It
    must exist, unless it is the default or is called `import` and lies beside the store."""

    host: str = "127.0.0.1"
    """Address that the gRPC services listen on."""
    port: Port = 50051
    """Port of the gRPC services; 0 picks a free one."""
    admin_host: str = "127.0.0.1"
    """Address that the metrics endpoint (/metrics over HTTP) listens on."""
    admin_port: Port = 9464
    """Port of the metrics endpoint; 0 picks a free one."""
    insecure: bool = False
    """Allow addresses that other machines can reach, although callers are not authenticated."""
    max_connections: int = Field(1024, ge=1, le=1 << 20)
    """Most connections to the gRPC port; further ones are closed at once."""
    reflection: bool = True
    """Serve gRPC reflection."""

    gpu_memory: float = Field(0.9, gt=0, le=1)
    """Fraction of a GPU's memory that may be in use, that of other processes included. Without
    effect on a CPU."""
    kv_memory: ByteSize = ByteSize(0)
    """Memory of the KV cache; 0 uses 512 MiB on a CPU, and on a GPU what gpu_memory leaves."""
    kv_tokens: int = Field(0, ge=0)
    """Size of the KV cache in tokens; 0 sizes it by kv_memory."""
    adapter_memory: ByteSize = ByteSize(1 << 30)
    """Device memory for adapters."""
    host_adapter_memory: ByteSize = ByteSize(1 << 30)
    """Host memory for adapters that were evicted from the device or will be needed next; with 0
    they are read from disk each time."""
    merge_memory: ByteSize = ByteSize(1 << 30)
    """Device memory for the dense weights of merged adapters; with 0 no adapter can be merged."""
    virtual_tokens: int = Field(1024, ge=0, le=1 << 20)
    """KV cache tokens reserved for the virtual tokens of adapters; with 0, adapters that have
    virtual tokens are not served."""

    max_rank: int = Field(256, ge=1, le=4096)
    """Largest rank of an adapter."""
    max_adapter_file: ByteSize = Field(ByteSize(4 << 30), ge=1)
    """Largest weights file of an adapter, sent by a client or imported."""
    max_virtual_tokens: int = Field(512, ge=0, le=1 << 20)
    """Largest number of virtual tokens of one adapter, at most virtual_tokens. Above token_budget,
    loading such an adapter can make a step longer than any prompt does."""
    merge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the dense weights of merged adapters; `auto` uses dtype."""

    adapter_chat_templates: bool = False
    """Let clients register adapters with a chat template of their own, and render conversations
    for such an adapter with it. Templates run in a sandbox."""

    max_context: int = Field(0, ge=0)
    """Longest prompt and answer together, in tokens; 0 uses the model's context length."""
    chat_template: PathOrNone = None
    """File with a chat template (Jinja), in place of the model's. If empty, the model's is used."""
    special_tokens_in_messages: bool = False
    """Recognise control tokens that messages spell out, also in the data of training jobs, so that
    a message can end its turn and open another. By default they are text."""
    prefix_cache: bool = True
    """Keep keys and values of prompts and answers, for later requests that begin alike."""
    token_budget: int = Field(512, ge=1)
    """Most tokens in one step: decode rows and prompt chunks together."""
    prompt_step_ratio: float = Field(2.0, ge=0, le=1000)
    """How many times as long as a step that only decodes a step with prompt chunks may take. Lower
    values keep the time between tokens even, higher ones compute prompts faster; 0 sets no limit.
    """
    max_running: int = Field(64, ge=1)
    """Most requests in one step."""
    max_waiting: int = Field(256, ge=0)
    """Most requests that may wait beyond the running ones; further ones are refused."""
    max_waiting_tokens: int = Field(1 << 18, ge=1)
    """Most prompt tokens that may wait; further requests are refused."""
    max_queue_seconds: float = Field(60.0, ge=0, le=86_400)
    """Longest predicted wait with which a request is accepted; 0 accepts any."""
    fair_weights: str = ""
    """Shares of adapters while requests wait, in proportion to each other, as name=weight,...;
    `_base` is the base without an adapter, a+b a mix. Those that are not named have 1."""
    max_priority: int = Field(MAX_PRIORITY, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Highest priority of a request; a higher one counts as this."""
    adapter_turn: float = Field(30.0, ge=0, le=86_400)
    """Time that a request may keep its adapter on the device while others wait for the place; it
    then goes on when the adapter is back. 0 sets no limit."""
    stream_writes: int = Field(256, ge=0)
    """Messages per second over all streams above which tokens are sent several at a time; 0 sends
    each token at once."""
    drain_timeout: float = Field(30.0, ge=0, le=86_400)
    """Seconds that running requests have to finish after SIGTERM."""
    write_stall_timeout: float = Field(30.0, gt=0, le=86_400)
    """Seconds after which a request is ended because its client does not read the stream."""
    engine_start_timeout: float = Field(1800.0, ge=1, le=86_400)
    """Seconds that the engine may take to become ready when the server starts. A restart may take
    two minutes, or four times as long as the first start, and longer after one that was cut off."""
    engine_hang_timeout: float = Field(300.0, ge=1, le=86_400)
    """Seconds that one step of the engine may take before its process is replaced. A process
    that gives no sign of life for half a minute is replaced as well."""

    training: bool = False
    """Train adapters on request, in a process of their own."""
    training_jobs_dir: Path = Path("var/training")
    """Directory of the training jobs: data, checkpoints and records."""
    training_max_jobs: int = Field(16, ge=0)
    """Most training jobs that may wait beyond the running one; further ones are refused."""
    training_keep_jobs: int = Field(100, ge=1)
    """Number of ended training jobs to keep; older ones are removed."""
    training_memory: ByteSize = ByteSize(0)
    """Most memory that a training job may use; 0 allows all free memory."""
    training_threads: int = Field(0, ge=0)
    """CPU threads of a training job; 0 uses half of the cores."""
    training_timeout: float = Field(86_400.0, ge=0, le=31_536_000)
    """Seconds that a training job may run; 0 sets no limit."""
    training_data: ByteSize = ByteSize(256 << 20)
    """Largest data file that is accepted from below the import root."""

    log_format: Literal["text", "json"] = "text"
    """Format of log lines: `text` for people, `json` for programs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""

    engine_factory: str = Field("", repr=False, pattern=r"^([\w.]+:\w+)?$")
    """Function that builds the engine's runner in tests, as `module:name`; empty: a real model."""
    engine_options: dict[str, Any] | None = Field(None, repr=False)
    """Keyword arguments of `engine_factory`."""
    trainer: list[str] | None = Field(None, repr=False)
    """Command line that starts the trainer. Tests set their own."""

    @field_validator("devices", mode="before")
    @classmethod
    def _joined(cls, given: object) -> object:
        """Accepts a list, or one number, from a TOML file."""
        if isinstance(given, list):
            return ",".join(map(str, given))
        return str(given) if type(given) is int else given

    @field_validator("fair_weights", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        """Accepts a table from a TOML file."""
        return fair_weights.listed(given) if isinstance(given, dict) else given

    @field_validator("fair_weights")
    @classmethod
    def _weighed(cls, text: str) -> str:
        fair_weights.parse(text)
        return text

    @field_validator("devices")
    @classmethod
    def _known(cls, text: str) -> str:
        devices.parse(text)
        return text

    @model_validator(mode="after")
    def _coherent(self) -> Config:
        devices.require_agreement(self.placements, self.device)
        if self.max_running > self.token_budget:
            raise ValueError("max_running must be at most token_budget")
        for name in ("host", "admin_host"):
            host = getattr(self, name)
            if not self.insecure and not _is_loopback(host):
                raise ValueError(
                    f"{name} {host!r} can be reached from other machines, and callers are not "
                    "authenticated; listen on 127.0.0.1, or allow it with --insecure"
                )
        return self

    def lines(self) -> list[str]:
        """Resolved settings as lines `name = value`, for the log."""
        shown = {name for name, field in type(self).model_fields.items() if field.repr}
        values = self.model_dump(mode="json", include=shown)
        return [f"{name} = {value}" for name, value in values.items()]

    @property
    def makes_import_root(self) -> bool:
        """Whether a missing import root is created: the default, or one like it beside the store.

        Any other import root must exist, since a new, empty directory would hide a mistyped path.
        """
        default = type(self).model_fields["import_root"].default
        beside = os.path.abspath(self.store.parent) == os.path.abspath(self.import_root.parent)
        return self.import_root == default or (beside and self.import_root.name == default.name)

    def prepare_import_root(self) -> None:
        """Creates the import root if `makes_import_root`. Raises OSError if there is none then."""
        root = self.import_root
        if self.makes_import_root:
            root.mkdir(parents=True, exist_ok=True)
        if not os.path.isdir(root):
            problem = errno.ENOTDIR if os.path.exists(root) else errno.ENOENT
            text = "; create the directory, or correct import_root (--import-root)"
            raise OSError(problem, os.strerror(problem) + text, str(root))

    @property
    def placements(self) -> list[EnginePlacement]:
        """The devices of several engines; empty if there is one engine, on `device`."""
        return devices.parse(self.devices)

    @property
    def engine_count(self) -> int:
        """Number of engine processes."""
        return len(self.placements) or 1

    def engine_setup(self) -> EngineSetup:
        """Settings of an engine process, the same for each."""
        custom = CustomRunner(self.engine_factory, self.engine_options or {})
        runner = custom if self.engine_factory else self.runner_config()
        beat_seconds = min(BEAT_SECONDS, self.engine_hang_timeout / 10)
        return EngineSetup(runner, self.engine_limits(), beat_seconds)

    def supervision_limits(self) -> SupervisionLimits:
        """What is tolerated of the engine process."""
        limits = SupervisionLimits(start=self.engine_start_timeout, stuck=self.engine_hang_timeout)
        return replace(limits, silent=min(limits.silent, self.engine_hang_timeout))

    def runner_config(self) -> RunnerConfig:
        """Settings of the engine's runner for a real model."""
        return RunnerConfig(
            model=self.model,
            dtype=self.dtype,
            device=self.engine_device,
            threads=self.engine_threads,
            cache=str(self.cache),
            max_context=self.max_context,
            kv_tokens=self.kv_tokens,
            kv_memory=int(self.kv_memory),
            gpu_memory=self.gpu_memory,
            token_budget=self.token_budget,
            max_running=self.max_running,
            cuda_graphs=self.cuda_graphs,
            adapter_memory=int(self.adapter_memory),
            host_adapter_memory=int(self.host_adapter_memory),
            merge_memory=int(self.merge_memory),
            merge_dtype=self.dtype if self.merge_dtype == "auto" else self.merge_dtype,
            virtual_tokens=self.virtual_tokens,
            max_rank=self.max_rank,
            max_adapter_file=int(self.max_adapter_file),
            max_virtual_tokens=self.adapter_virtual_tokens,
        )

    def trainer_options(self) -> dict[str, str]:
        """Training options that the operator fixes, keyed by the trainer's names."""
        return {
            "model": self.model,
            "chat_template": str(self.chat_template.absolute()) if self.chat_template else "",
            "special_tokens_in_messages": str(self.special_tokens_in_messages).lower(),
            "dtype": self.dtype,
            "device": self.engine_device,
            "cache": str(self.cache.absolute()),
        }

    def trainer_environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """Variables for the trainer, which computes where the first of several engines does."""
        return self.placements[0].environment(outer) if self.placements else {}

    @property
    def engine_device(self) -> Literal["auto", "cpu", "cuda"]:
        """Device of an engine, as its process sees it."""
        return self.placements[0].kind if self.placements else self.device

    @property
    def engine_threads(self) -> int:
        """CPU threads of one engine; 0 for all cores."""
        if self.engine_count == 1 or self.engine_device == "cuda":
            return self.threads
        return max(1, (self.threads or available_cores()) // self.engine_count)

    @property
    def trainer_threads(self) -> int:
        """CPU threads of a training job."""
        return self.training_threads or max(1, available_cores() // 2)

    @property
    def adapter_virtual_tokens(self) -> int:
        """Largest number of virtual tokens of one adapter, within what is reserved for all."""
        return min(self.virtual_tokens, self.max_virtual_tokens)

    @property
    def max_requests(self) -> int:
        """Most requests in the server, running and waiting."""
        return self.engine_count * self.max_running + self.max_waiting

    @property
    def reserved_requests(self) -> int:
        """Places in the server beyond `max_requests`, for accounts that have few requests."""
        return self.max_requests // RESERVED

    def engine_limits(self) -> EngineLimits:
        """Limits of an engine. Its queue is longer than the front's, which refuses first."""
        return EngineLimits(
            token_budget=self.token_budget,
            max_running=self.max_running,
            max_waiting=self.max_requests + self.reserved_requests,
            max_waiting_tokens=2 * self.max_waiting_tokens,
            prefix_cache=self.prefix_cache,
            prompt_step_ratio=self.prompt_step_ratio,
            fair_weights=fair_weights.parse(self.fair_weights),
            max_queue_seconds=self.max_queue_seconds,
            adapter_turn=self.adapter_turn,
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
