"""The process: worker threads, watched tasks, the metrics endpoint, failures and shutdown."""
