"""The decoder on CUDA: Triton kernels, the plan of a pass, and the device memory behind them.

Nothing here is imported on a machine without CUDA, except by tests that run the kernels in Triton's
interpreter. This room owns launches and device buffers; the formulas are those of
`loraplex_model.adapters.delta`, and the oracle is `decoder.reference`.
"""
