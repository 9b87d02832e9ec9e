"""Conversion between text and tokens, independent of gRPC and of the engine's process."""
