"""`/v1/embeddings`: vectors of texts, as the base or an adapter computes them."""
