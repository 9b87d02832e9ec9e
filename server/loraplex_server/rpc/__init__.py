"""The gRPC side of the front process; nothing else of the server speaks gRPC."""
