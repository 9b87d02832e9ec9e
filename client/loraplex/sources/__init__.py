"""Where adapters come from: addresses in hubs, buckets and folders, and ids of other programs.

A server never connects to anything. Adapters are fetched in a process of its own, by people and by
programs beside a server: `loraplex pull`, an init container, or the gateway, which starts it.
"""

from loraplex.sources.addresses import AdapterAddress, AddressInvalid, AllowList
from loraplex.sources.fetching import Pulled, pull
from loraplex.sources.remote import PullFailed

__all__ = ["AdapterAddress", "AddressInvalid", "AllowList", "PullFailed", "Pulled", "pull"]
