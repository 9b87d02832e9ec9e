"""The Loraplex server: the engine, the gRPC services, and the process that joins them."""
