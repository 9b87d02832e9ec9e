"""The front process: worker threads, watched tasks, metrics endpoint, failures and shutdown."""
