"""Adapters for and from other programs: exports, blends, merged checkpoints, importers.

Owns the formats that the server itself does not serve from. It never registers an adapter, and no
other room imports it. The server's commands `export` and `convert` are built on it, and the trainer
uses its writers of new directories and of adapter_config.json.
"""
