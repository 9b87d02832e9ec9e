"""A run from start to end: inputs, rounds, evaluation, generation, checkpoints.

Owns the run's directory and the process-wide settings. Never registers an adapter; `publish` does.
"""
