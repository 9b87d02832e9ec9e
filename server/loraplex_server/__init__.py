"""The Loraplex server: the engine, the gRPC services in front of it, and the process that joins them."""
