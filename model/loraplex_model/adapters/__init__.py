"""Adapters in memory: their changes as values, packed bytes, the table of slots, the arithmetic.

This room owns the formulas by which an adapter changes a base model. It reads no files;
`loraplex_adapters` does.
"""
