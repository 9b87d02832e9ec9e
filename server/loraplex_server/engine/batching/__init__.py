"""Which rows are computed in a step: requests, the scheduler, KV blocks, the batch, the sampler.

Owns KV block bookkeeping. Plain Python and numpy: imports neither torch nor grpc.
"""
