"""Text made of tokens and tokens made of text; knows nothing of gRPC or of the engine's process."""
