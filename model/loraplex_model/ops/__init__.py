"""Arithmetic on tensors, one operation a module: NF4, matrix products, rotation, elementwise steps.

Owns the compiled CPU library (`build`). Knows neither adapters nor the shape of a decoder.
"""
