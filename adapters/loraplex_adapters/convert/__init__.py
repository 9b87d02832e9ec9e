"""Adapters for and from other programs: exports, blends, merged checkpoints, importers.

Owns the formats that the server itself does not serve from. Nothing else imports this room.
"""
