"""What a run reports: events, the terminal, curves, the run's record and the model card.

Owns how events are shown and written. Never changes the run.
"""
