"""One optimiser step: the joint forward and backward pass, the loss, optimisers, memory.

Owns gradients and optimiser state. Never writes a file.
"""
