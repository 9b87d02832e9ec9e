"""Publishes a trained adapter: writes, verifies, registers and uploads it.

Owns the way to a store or a server. Never trains.
"""
