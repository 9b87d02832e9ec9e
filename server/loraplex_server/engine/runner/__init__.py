"""The seam between the engine and whatever computes, and the runner of a real model.

Owns the model, its KV tensors and device memory. Knows nothing of requests.
"""
