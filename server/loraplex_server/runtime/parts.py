"""Makes parts of the server from its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Store, UploadBounds
from loraplex_model.checkpoints.tokenizer import TOKENIZER

from loraplex_server.access.audit_log.file import AuditFile
from loraplex_server.access.audit_log.lines import AuditLog, LoggedAudit
from loraplex_server.access.identity.directory import PrincipalDirectory, open_directory
from loraplex_server.config import Config
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.group.group import EngineGroup, members
from loraplex_server.engine.group.shedding import HostShedding
from loraplex_server.engine.messages import Hello, ModelInfo
from loraplex_server.engine.process.child import SpawnedEngine
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.exits import ServerExit
from loraplex_server.forms.checker import FormChecker
from loraplex_server.forms.process import CHECK_BYTES, CheckSetup
from loraplex_server.metrics import Metrics
from loraplex_server.observing import ServerObserver
from loraplex_server.rpc.calls.access import AccessCheck
from loraplex_server.rpc.messages.validate import ModelBounds
from loraplex_server.rpc.server import Address
from loraplex_server.runtime.failures import needed
from loraplex_server.runtime.lanes import Lane
from loraplex_server.runtime.pressure import MemoryPressure
from loraplex_server.runtime.process_memory import default_limit, give_back, used_bytes
from loraplex_server.series import Series
from loraplex_server.text.tokenizer import TextTokenizer


def engine_of(config: Config, observer: ServerObserver, spawned: SpawnedEngine | None) -> Engine:
    """The engine of a server: one process, or one for each of several devices."""
    command, limits = config.engine_setup().command(), config.supervision_limits()
    if not config.placements:
        return EngineClient(command, observer, limits=limits, spawned=spawned)
    return EngineGroup([(each, command) for each in config.placements], observer, limits)


def principals_of(config: Config) -> PrincipalDirectory | None:
    """The principals and their keys; None if callers are not identified. Raises StartFailure."""
    with needed(ServerExit.BAD_CONFIG, "cannot read"):
        return open_directory(config)


def audit_log_of(config: Config, metrics: Metrics) -> AuditLog:
    """The audit log, in a file or in the server's log. Raises StartFailure."""
    if config.audit_log is None:
        return AuditLog(LoggedAudit(metrics), metrics)
    with needed(ServerExit.BAD_CONFIG, "cannot write the audit log"):
        return AuditLog(AuditFile(config.audit_log, metrics), metrics)


def addresses_of(config: Config) -> list[Address]:
    """The addresses of the services: for all callers, and for managing, if that is apart."""
    addresses = [Address(config.host, config.port)]
    if config.manage_host:
        addresses.append(Address(config.manage_host, config.manage_port))
    return addresses


def access_checks_of(config: Config, directory: PrincipalDirectory | None) -> list[AccessCheck]:
    """What decides about the calls at each of the addresses."""
    if not config.manage_host:
        return [AccessCheck(directory, manages=True)]
    return [AccessCheck(directory, manages=False), AccessCheck(directory, manages=True)]


def tokenizer_of(config: Config, model: ModelInfo, context: int, lane: Lane) -> TextTokenizer:
    """The tokenizer of the model that the engine serves. Reads files; raises OSError, Refusal."""
    return TextTokenizer(
        Path(model.tokenizer_path),
        context,
        lane,
        eos_token_ids=model.eos_token_ids,
        special_tokens_in_messages=config.special_tokens_in_messages,
        chat_template=config.chat_template,
    )


def bounds_of(
    config: Config, model: ModelInfo, context: int, tokenizer: TextTokenizer
) -> ModelBounds:
    """What of requests depends on the model, and on what of it is served."""
    is_structured = config.structured_output and tokenizer.spells_bytes
    return ModelBounds(
        model.base.config.vocab_size,
        context,
        tokenizer.eos_token_ids,
        max_structure=int(config.max_structure) if is_structured else 0,
    )


def form_checker_of(config: Config, model: ModelInfo, series: Series) -> FormChecker:
    """What checks structured output. Nothing is started until there is something to check."""
    setup = CheckSetup(
        tokenizer=str(Path(model.tokenizer_path) / TOKENIZER),
        vocab_size=model.base.config.vocab_size,
        memory=CHECK_BYTES,
        eos_token_ids=model.eos_token_ids,
    )
    return FormChecker(setup.command(), config.structure_timeout, series)


def store_of(config: Config) -> Store:
    """The adapter store, with an import root beside it. Blocks; raises OSError, Refusal."""
    config.prepare_import_root()
    bounds = UploadBounds(max_weights_bytes=int(config.max_adapter_file))
    return Store(config.store, config.store_url.get_secret_value(), bounds)


def memory_pressure_of(
    config: Config, engine: Callable[[], Engine], series: Series
) -> MemoryPressure:
    """What refuses calls when memory runs short. `engine` is asked for when that happens."""
    limit = int(config.memory_limit) or default_limit()
    shedding = HostShedding(lambda: members(engine()))
    return MemoryPressure(limit, used_bytes, shedding, series, give_back)


def adapter_limits_of(config: Config, hello: Hello, context: int) -> AdapterLimits:
    """What adapters may need on the engine that `hello` describes."""
    return AdapterLimits(
        max_rank=config.max_rank,
        max_weights_bytes=int(config.max_adapter_file),
        max_device_bytes=hello.adapter_budget_bytes,
        max_virtual_tokens=config.adapter_virtual_tokens,
        max_context=context,
    )


def announce(engine: Engine, where: str, seconds: float) -> None:
    """Prints that the server is ready at `where`, `seconds` after its start."""
    model = engine.hello.model
    devices = ", ".join(member.device for member in members(engine))
    what = f"{model.name} ({model.base.dtype} on {devices})"
    print(f"ready: {where} model {what} in {seconds:.1f} s", flush=True)
