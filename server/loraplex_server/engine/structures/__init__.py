"""Structured output in the engine: which tokens may follow, for each request that asks for it.

Owns the matchers of grammars and the threads that build them and compute masks. Never decides what
a request may ask for: the front has checked every grammar in a process of its own (`forms`).
"""
