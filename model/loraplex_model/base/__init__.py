"""The ground floor: the description of a base model, refusals, and small helpers for all packages.

This room owns the values that describe a base model. It imports neither torch nor grpc, except in
`weights` and `families`, and no other room of the project. It computes nothing.
"""
