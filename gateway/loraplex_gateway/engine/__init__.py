"""What the server's engine computes at present."""
