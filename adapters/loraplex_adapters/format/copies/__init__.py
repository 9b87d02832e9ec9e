"""Tensors that stand for the base's own weights, and tensors that a file holds under two names.

PEFT saves such copies next to adapted embeddings and heads, and loads every tensor that is named
like a parameter of the model. `names` is the table of the names, `placing` finds what each copy
would replace, and `settling` compares the values and leaves out what changes nothing.
"""
