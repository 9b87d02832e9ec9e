"""A run from start to end: inputs, rounds, evaluation, generation, checkpoints.

Owns the run's folder and its process-wide settings. Never registers an adapter; `publish` does.
"""
