"""The forward pass: attention and layers, in torch and as one call into the C++ kernels.

This room owns the layout of the KV cache and the kernels in `cpu/`. It never decides which rows are
computed.
"""
