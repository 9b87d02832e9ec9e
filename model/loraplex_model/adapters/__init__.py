"""Adapters in memory: what they change, packed bytes, the table of addresses, the arithmetic.

Owns the formula by which an adapter changes a base. Reads no files; `loraplex_adapters` does.
"""
