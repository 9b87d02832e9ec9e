"""A base model before its conversion: whether it is served, and its features, sizes and speed.

Nothing here reads weights, except a few numbers of a head that may equal the embeddings, and
nothing is written.
"""
