"""Expressions over module names that a configuration may hold, matched without running them.

Owns the grammar of what is understood and an automaton whose work is bounded by a count. It never
gives a file's text to Python's `re`, whose running time can grow exponentially.
"""
