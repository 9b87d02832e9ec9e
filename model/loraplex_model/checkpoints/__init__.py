"""Loading base models: checkpoints are found, converted once, cached, and mapped from the cache.

This room owns every file format of base models, and how prompts become token ids. It never computes
a forward pass and has nothing about adapters.
"""
