"""Fetches adapters from hubs and buckets into local folders, in a process of its own.

A server never connects to anything. This package is for people and for programs beside a server:
`loraplex pull`, an init container, or the gateway, which starts it as a process.
"""

from loraplex.pull.addresses import Address, AddressInvalid, AllowList
from loraplex.pull.fetching import Pulled, pull
from loraplex.pull.remote import PullFailed

__all__ = ["Address", "AddressInvalid", "AllowList", "PullFailed", "Pulled", "pull"]
