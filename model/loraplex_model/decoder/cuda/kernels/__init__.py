"""The Triton kernels, one module for each step of a layer, and the functions that launch them.

Each module has `compilations()`, the configurations that `make gpu-aot` compiles without a device.
"""
