"""One pass on its way to the device and back: checks, arrays, memory, results.

Everything here is numpy and torch; the launches are in `network`, and the kernels' own input
formats beside the kernels that read them.
"""
