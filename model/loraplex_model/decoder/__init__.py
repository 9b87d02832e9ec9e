"""The forward pass: attention and layers, in torch and as one call into the C++ kernels.

Owns the KV cache's layout and the kernels below `cpu/`. Never decides which rows are computed.
"""
