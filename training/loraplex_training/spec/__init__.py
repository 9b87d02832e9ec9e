"""The options of a training run: their declaration, limits, flags, files and sweeps.

Imports no torch and reads no data.
"""
