"""The ground floor of the model: configurations, weights and errors that every other room uses.

Owns the values that describe a base model. Imports neither torch nor grpc, but for `weights` and
`families`; opens no file and computes nothing.
"""
