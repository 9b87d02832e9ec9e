"""An adapter on disk: configuration, tensors, kinds, and whether a base model can serve it.

Owns everything that is checked before an adapter is accepted. Imports no torch.
"""
