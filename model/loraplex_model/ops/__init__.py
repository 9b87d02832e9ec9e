"""Arithmetic on tensors, one operation per module: NF4, matrix products, rotation, norms.

This room owns the compiled CPU library (`build`). It has nothing about adapters or the
structure of a decoder.
"""
