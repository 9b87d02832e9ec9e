"""The engine: requests in, one step at a time, tokens out. Runs in a process of its own.

Owns the model and everything on the device. Speaks to the front by `messages` only.
"""
