"""Who may do what: principals, their roles and adapters, and how a caller proves who it is.

Imports no gRPC. `rpc/calls` identifies the caller of every call and sets it (`caller`); services
ask it what the caller may see.
"""
