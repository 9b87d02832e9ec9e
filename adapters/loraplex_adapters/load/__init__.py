"""From checked adapter files to an `AdapterDelta` in memory: PEFT's arithmetic, done once at load.

Owns the reading of tensor bytes. It never decides whether a file is acceptable; `format` does.
"""
