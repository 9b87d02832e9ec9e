"""One generation call: its requests to the engine, and how their events become one stream.

Owns no limits and no metrics: the service counts what a call takes.
"""
