"""The path of every call: connections, the bytes that arrive, bounds, failures, what is written."""
