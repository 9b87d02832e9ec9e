"""Programs that others wrote, run unmodified against a server with its gateway: make test-clients."""
