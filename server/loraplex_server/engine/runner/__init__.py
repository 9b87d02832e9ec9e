"""The seam between the engine and the model, and the runner of a real model.

Owns the model, its KV tensors and device memory. Does not see requests.
"""
