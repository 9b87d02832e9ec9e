"""What the commands that check something share: the result of a check, and adapters' limits."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_adapters.format.spec import AdapterLimits

from loraplex_server.config import Config


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check.

    `good` is False for what the server could not serve with, or could not serve all adapters with,
    and for damage. What is damaged in the cache is built again when it is needed, but something has
    damaged it.
    """

    subject: str
    text: str
    good: bool = True


def adapter_limits(config: Config) -> AdapterLimits:
    """The limits that the server with these settings has for adapters."""
    return AdapterLimits(
        max_rank=config.max_rank,
        max_weights_bytes=int(config.max_adapter_file),
        max_device_bytes=int(config.adapter_memory),
        max_virtual_tokens=config.adapter_virtual_tokens,
        max_context=config.max_context or None,
    )
