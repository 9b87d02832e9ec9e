"""The gRPC services, one module each, and the modules that only one of them uses."""
