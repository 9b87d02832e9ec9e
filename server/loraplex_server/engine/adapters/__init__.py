"""Which adapters are on the device: slots, reads, the host tier, eviction, merged copies.

Owns adapter slots and host memory for adapters. Never computes a row.
"""
