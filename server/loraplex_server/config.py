"""The server's configuration: the settings, checked, and what its parts take from them."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from loraplex_model.base.process.core_dumps import CORE_DUMPS_VARIABLE
from pydantic import field_validator, model_validator

from loraplex_server import fair_weights
from loraplex_server.access import settings as access
from loraplex_server.declared.labels import DirectoryLabels
from loraplex_server.declared.named import require_different
from loraplex_server.engine.batching.limits import EngineLimits
from loraplex_server.engine.batching.shares import RESERVED
from loraplex_server.engine.group import devices
from loraplex_server.engine.group.devices import EnginePlacement
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.engine.process.pulse import BEAT_SECONDS
from loraplex_server.engine.process.setup import EngineSetup
from loraplex_server.engine.runner.config import CustomRunner, RunnerConfig
from loraplex_server.runtime.hub import OFFLINE
from loraplex_server.settings import ServerSettings


class Config(ServerSettings):
    """The settings of a server, which agree with each other. `config_sources` reads them."""

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
        access.require_coherent(self)
        require_different(self.adapters)
        self.directory_labels.check()
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
    def directory_labels(self) -> DirectoryLabels:
        """The labels of the adapters in the watched directory."""
        own = frozenset(self.adapter_directory_own_labels)
        return DirectoryLabels(self.adapter_directory_labels, own)

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
        return EngineSetup(
            runner, self.engine_limits(), beat_seconds, self.log_format, self.core_dumps
        )

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
        """Variables for the trainer, which computes where the first of several engines does.

        It finds the base model where the engine has put it.
        """
        there = self.placements[0].environment(outer) if self.placements else {}
        return {**there, **OFFLINE, CORE_DUMPS_VARIABLE: str(self.core_dumps).lower()}

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


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
