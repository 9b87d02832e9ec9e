"""From a name or a directory to base weights and a tokenizer: read, convert once, cache, map.

Owns every file format of base models. Never computes a forward pass.
"""
