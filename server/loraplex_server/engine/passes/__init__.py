"""Forward passes: how they are started and read, and how their results become outputs.

Owns the passes that are under way and the outputs that are not sent yet, and no adapters.
"""
