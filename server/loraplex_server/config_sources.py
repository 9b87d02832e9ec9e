"""Reads the settings: flags over environment (`LORAPLEX_*`) over a TOML file over defaults."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from loraplex_server import former_settings
from loraplex_server.config import Config


class ConfigError(Exception):
    """Settings that cannot be used. The message names every wrong setting, for the operator."""


def load(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """Reads the settings from all sources; `flags` holds the given flags. Raises ConfigError."""
    from_file: dict[str, Any] = {}
    if file is not None:
        try:
            from_file = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from error
    try:
        from_environment = EnvSettingsSource(Config)()
    except SettingsError as error:  # a list or a table that is not JSON
        raise ConfigError(f"the environment cannot be read: {error}") from error
    former = former_settings.in_environment(os.environ)
    given = {**from_file, **former, **from_environment, **flags}
    unknown = given.keys() - Config.model_fields.keys()
    problems = [f"{name}: {former_settings.objection(name)}" for name in sorted(unknown)]
    try:
        config = Config(**{name: given[name] for name in given if name not in unknown})
    except ValidationError as error:
        problems += map(_explain, error.errors())
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text
