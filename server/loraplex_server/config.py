"""The server's settings: flags over environment (`LORAPLEX_*`) over a TOML file over defaults."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

DEFAULT_MODEL: Final = "default"
ENGINE_FACTORY: Final = "loraplex_server.engine.runner.local:build"

Port = Annotated[int, Field(ge=0, le=65535)]


class ConfigError(Exception):
    """The settings cannot be used; the message names each that is wrong, for the operator."""


class Config(BaseSettings):
    """Everything that can be set. Sizes are bytes, or text such as "512MiB"; times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="LORAPLEX_",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    model: str = Field(DEFAULT_MODEL, min_length=1)
    """A Hugging Face causal LM: a directory, a GGUF file or a hub id; default is SmolLM2-135M."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What is computed in; the base's weights are NF4 either way."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto takes CUDA where there is one."""
    threads: int = Field(0, ge=0)
    """Threads of the engine's arithmetic; 0 takes the cores there are."""

    store: Path = Path("var/store")
    """Where registered adapters lie."""
    store_url: SecretStr = SecretStr("")
    """The store's index where several servers share it: postgresql://...; empty: in the store."""
    cache: Path = Path("var/cache")
    """Where quantised base models and compiled kernels lie."""
    import_root: Path = Path("var/import")
    """Adapters are registered from directories below this one, and from nowhere else."""

    host: str = "127.0.0.1"
    """Address of the gRPC services."""
    port: Port = 50051
    """Their port; 0 takes a free one."""
    admin_host: str = "127.0.0.1"
    """Address of /metrics, over HTTP."""
    admin_port: Port = 9464
    """Its port; 0 takes a free one."""
    insecure: bool = False
    """Listen beyond this machine although nothing checks who calls."""
    reflection: bool = True
    """Serve gRPC reflection."""

    max_context: int = Field(0, ge=0)
    """Longest prompt and answer together, in tokens; 0 takes the model's."""
    kv_tokens: int = Field(0, ge=0)
    """Tokens that the KV cache holds; 0 lets kv_memory decide."""
    kv_memory: ByteSize = ByteSize(512 << 20)
    """Bytes of the KV cache."""
    token_budget: int = Field(512, ge=1)
    """Tokens of one step, decode rows and prompt chunks together."""
    max_running: int = Field(64, ge=1)
    """Requests in one step."""
    max_waiting: int = Field(256, ge=0)
    """Requests beyond those that may wait; more are refused."""
    max_waiting_tokens: int = Field(1 << 18, ge=1)
    """Prompt tokens that may wait."""
    adapter_memory: ByteSize = ByteSize(1 << 30)
    """Device bytes for adapters."""
    host_adapter_memory: ByteSize = ByteSize(1 << 30)
    """Host bytes for adapters that left the device or are wanted next; 0 reads them again."""
    merge_memory: ByteSize = ByteSize(1 << 30)
    """Device bytes for the dense copies of merged adapters; 0 refuses to merge."""
    merge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What dense copies are kept in; auto takes dtype."""
    merge_auto: bool = False
    """Merge an adapter that dominates the traffic, where that is measured to be faster."""
    virtual_tokens: int = Field(1024, ge=0, le=1 << 20)
    """KV cache tokens set aside for the virtual tokens of adapters; 0 serves none that has some."""
    max_virtual_tokens: int = Field(512, ge=0, le=1 << 20)
    """Virtual tokens that one adapter may have; never more than are set aside. Those given by their
    embeddings are computed in one pass when the adapter is loaded: more than `token_budget` of them
    make a step longer than any prompt does."""
    max_rank: int = Field(256, ge=1, le=4096)
    """The largest rank that an adapter may have."""

    training: bool = False
    """Train adapters on request, in a process beside the engine's."""
    training_jobs_dir: Path = Path("var/training")
    """Where training jobs are kept: their data, checkpoints and records."""
    training_max_jobs: int = Field(16, ge=0)
    """Training jobs that may wait beyond the one that runs; more are refused."""
    training_keep_jobs: int = Field(100, ge=1)
    """Training jobs that have ended and are remembered; older ones are removed."""
    training_memory: ByteSize = ByteSize(0)
    """Bytes that a trainer may take; 0 takes what is free."""
    training_threads: int = Field(0, ge=0)
    """Threads of a trainer; 0 takes half of the cores."""
    training_timeout: float = Field(86_400.0, ge=0, le=31_536_000)
    """Seconds that a training job may run; 0: for ever."""
    training_data: ByteSize = ByteSize(256 << 20)
    """The largest data file that is taken from the import root."""

    stream_writes: int = Field(256, ge=0)
    """Messages a second over all streams, before tokens travel several at a time; 0: never."""
    drain_timeout: float = Field(30.0, ge=0, le=86_400)
    """Seconds that running requests may take to finish after SIGTERM."""
    write_stall_timeout: float = Field(30.0, gt=0, le=86_400)
    """Seconds that a message may wait for a client that has stopped reading."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people or for programs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""

    engine_factory: str = Field(ENGINE_FACTORY, repr=False, pattern=r"^[\w.]+:\w+$")
    """What builds the engine's runner; tests name their own."""
    engine_options: dict[str, Any] | None = Field(None, repr=False)
    """Its keyword arguments, in place of those made from the settings above."""
    trainer: list[str] | None = Field(None, repr=False)
    """The trainer's program; tests name their own."""

    @model_validator(mode="after")
    def _coherent(self) -> Config:
        if self.max_running > self.token_budget:
            raise ValueError("max_running must be at most token_budget")
        for name in ("host", "admin_host"):
            host = getattr(self, name)
            if not self.insecure and not _is_loopback(host):
                raise ValueError(
                    f"{name} {host!r} is reachable from other machines and nothing checks who "
                    "calls; listen on 127.0.0.1, or say --insecure"
                )
        return self

    def lines(self) -> list[str]:
        """The settings as they were resolved, `name = value`, for the log."""
        shown = {name for name, field in type(self).model_fields.items() if field.repr}
        values = self.model_dump(mode="json", include=shown)
        return [f"{name} = {value}" for name, value in values.items()]

    def runner_options(self) -> dict[str, Any]:
        """Keyword arguments of the engine's factory."""
        if self.engine_options is not None:
            return self.engine_options
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "cache": str(self.cache),
            "max_context": self.max_context,
            "kv_tokens": self.kv_tokens,
            "kv_memory": int(self.kv_memory),
            "adapter_memory": int(self.adapter_memory),
            "host_adapter_memory": int(self.host_adapter_memory),
            "merge_memory": int(self.merge_memory),
            "merge_dtype": self.dtype if self.merge_dtype == "auto" else self.merge_dtype,
            "virtual_tokens": self.virtual_tokens,
            "max_rank": self.max_rank,
            "max_virtual_tokens": self.adapter_virtual_tokens,
        }

    def trainer_options(self) -> dict[str, str]:
        """What of a training run is the operator's, by the trainer's names."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "cache": str(self.cache.absolute()),
        }

    @property
    def trainer_threads(self) -> int:
        """Threads that a trainer really takes."""
        return self.training_threads or max(1, available_cores() // 2)

    @property
    def adapter_virtual_tokens(self) -> int:
        """Virtual tokens that one adapter may really have."""
        return min(self.virtual_tokens, self.max_virtual_tokens)

    def engine_limits(self) -> dict[str, int]:
        """Bounds of the engine. The front refuses first, so its queue bounds are the wider ones."""
        return {
            "token_budget": self.token_budget,
            "max_running": self.max_running,
            "max_waiting": self.max_running + self.max_waiting,
            "max_waiting_tokens": 2 * self.max_waiting_tokens,
        }


def load(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The settings from all sources. `flags` holds those given. Raises ConfigError."""
    from_file: dict[str, Any] = {}
    if file is not None:
        try:
            from_file = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from error

    class Sources(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, _Values(cls, from_file)

    try:
        return Sources(**flags)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors())) from error


class _Values(PydanticBaseSettingsSource):
    """A settings source that holds a dictionary."""

    def __init__(self, settings: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings)
        self._values = values

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such setting"
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
