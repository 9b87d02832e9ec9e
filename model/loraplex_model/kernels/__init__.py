"""The hand-written kernels, and how they come to be compiled."""
