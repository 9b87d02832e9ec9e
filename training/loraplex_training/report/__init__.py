"""Reports of a run: events, terminal output, curves, the run's record and the model card.

Owns how events are shown and written. Never changes the run. Imports no torch, except to describe
the machine.
"""
