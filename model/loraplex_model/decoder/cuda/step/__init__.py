"""One pass on its way to the device and back: checks, arrays, memory, results.

Everything here is numpy and torch; the launches are in `network`, and the input
formats of the kernels are defined next to the kernels.
"""
