"""What can be said of a base model before it is converted: features, sizes, speed.

Nothing here reads weights, except a few numbers of a head that may equal the embeddings, and
nothing is written.
"""
