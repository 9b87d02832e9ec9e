"""Memory for adapters: pinned on the host, an arena on the device, copies from one to the other.

This room owns bytes and streams. What the bytes mean is known to `loraplex_model.adapters`.
"""
