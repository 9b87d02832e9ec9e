"""The adapters that are registered, as this server knows them."""
