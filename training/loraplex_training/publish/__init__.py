"""From a trained adapter to a served one: written, verified, registered or uploaded.

Owns the hand-over to a store or a server. Never trains.
"""
