"""What a process asks of the system for itself."""
