"""Vectors of texts: the path of an Embed call from its texts to the engine and back."""
