"""The rows of a step: requests, the scheduler, KV blocks, the batch, the sampler.

Owns the bookkeeping of KV blocks. Plain Python and numpy: imports neither torch nor grpc.
"""
