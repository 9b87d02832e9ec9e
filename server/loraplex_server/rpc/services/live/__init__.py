"""The live batch: which requests the engine computes at present, as each caller may see them."""
