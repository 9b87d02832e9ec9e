"""Programs that others wrote, unmodified, and a gateway that they speak to: make test-clients."""
