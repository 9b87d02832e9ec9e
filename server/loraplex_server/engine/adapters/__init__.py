"""Adapters on the device: slots, loads, the host tier, eviction, merged copies.

`adapters.Adapters` is the face of this room. Owns adapter slots and adapters in host memory. Never
computes a row.
"""
