"""Roles, and the roles with which each method may be called."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Role(StrEnum):
    """A group of calls. Roles add up; none includes another."""

    INFER = "infer"
    """Generate, and render conversations."""
    READ = "read"
    """Look up, list and watch adapters and training jobs."""
    REGISTER = "register"
    """Upload, register, label and delete adapters, and set aliases."""
    ADMIN = "admin"
    """Load, unload, pin and merge adapters."""
    TRAIN = "train"
    """Create and cancel training jobs."""


ALL_ROLES: Final = frozenset(Role)

_GENERATION: Final = "/loraplex.v1.GenerationService/"
_MODEL: Final = "/loraplex.v1.ModelService/"
_ADAPTERS: Final = "/loraplex.v1.AdapterService/"
_ENGINE: Final = "/loraplex.v1.EngineService/"
_TRAINING: Final = "/loraplex.v1.TrainingService/"
_REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/"


def _each(service: str, methods: str, *roles: Role) -> dict[str, frozenset[Role]]:
    return {service + method: frozenset(roles) for method in methods.split()}


METHOD_ROLES: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {
        **_each(_GENERATION, "Generate GenerateStream Embed", Role.INFER),
        **_each(_MODEL, "GetModel", *Role),
        **_each(_MODEL, "RenderChat Tokenize Detokenize", Role.INFER),
        **_each(_ENGINE, "WatchEngine", Role.READ),
        **_each(_ADAPTERS, "GetAdapter ListAdapters ListAdapterVersions WatchAdapters", Role.READ),
        **_each(
            _ADAPTERS,
            "ValidateAdapter RegisterAdapter LabelAdapter SetAlias DeleteAlias DeleteAdapter "
            "RestoreAdapter StartUpload UploadAdapter GetUpload ListUploads AbortUpload",
            Role.REGISTER,
        ),
        **_each(
            _ADAPTERS,
            "LoadAdapter UnloadAdapter PinAdapter UnpinAdapter MergeAdapter UnmergeAdapter",
            Role.ADMIN,
        ),
        **_each(_TRAINING, "CreateJob CancelJob UploadData DeleteData", Role.TRAIN),
        **_each(_TRAINING, "GetJob ListJobs WatchJob ListJobEvents", Role.TRAIN, Role.READ),
        **_each(_TRAINING, "GetData ListData ReadData", Role.TRAIN, Role.READ),
        **_each(_REFLECTION, "ServerReflectionInfo", *Role),
    }
)
"""The roles of which a caller needs one. A method that is not listed here is refused to everybody,
except those of `OPEN_METHODS`."""

OPEN_METHODS: Final = frozenset(
    f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch")
)
"""Methods for everybody, also without a credential: probes have none."""

AUDITED_ROLES: Final = frozenset({Role.REGISTER, Role.ADMIN, Role.TRAIN})
"""Calls that need one of these roles change something, so they are recorded in the audit log, and
they may have an address of their own."""


def is_managing(method: str) -> bool:
    """Whether a method changes adapters, their places or training jobs."""
    roles = METHOD_ROLES.get(method, frozenset())
    return bool(roles) and roles <= AUDITED_ROLES
