"""What a checkpoint becomes: the tensors of its stored form, checked before it is converted.

This folder reads names, types and shapes. It reads no values, except to compare a head with the
embeddings.
"""
